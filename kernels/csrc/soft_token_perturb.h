// The noise on the slots of a row; kinds as in softgrpo_kernels/methods.
#pragma once
#include "soft_token_row.h"

namespace softgrpo {

// Turns log p into g' and sorts the slots by it. Returns how many stay in use.
int64_t perturb(Slot* slots, int64_t count, const Row& row);

}  // namespace softgrpo
