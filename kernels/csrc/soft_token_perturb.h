// The noise on the slots of a row; kinds as in softgrpo_kernels/methods.
#pragma once
#include "soft_token_row.h"

namespace softgrpo {

// Turns log p, best first, into g' and sorts the slots by it, behind the token where it is drawn.
void perturb(Slot* slots, int64_t count, const Row& row);

}  // namespace softgrpo
