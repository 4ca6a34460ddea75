"""The entropy that rules of thinking go by."""

from __future__ import annotations

from torch import Tensor


def entropy(logits_BV: Tensor, temperature_B1: Tensor) -> Tensor:
    """Of softmax(logits / temperature) over the vocabulary, in nats: float32 [B].

    From the logits as they are: those in bf16 carry a rounding of up to 2^-9 |z|, which an entropy
    of h nats has some 2^-9 |z| h of. With a = z - max z it is log sum exp a - sum a exp a / sum
    exp a, whose terms are all >= 0: a logarithm for each row, not for each token.
    """
    a_BV = logits_BV / temperature_B1
    # Where a logit is -inf, exp is 0 and its product with a is to be as well.
    a_BV = a_BV.sub_(a_BV.amax(-1, keepdim=True)).clamp_(min=-1e4)
    exp_BV = a_BV.exp()
    sum_B = exp_BV.sum(-1)
    return sum_B.log() - a_BV.mul_(exp_BV).sum(-1) / sum_B
