"""The mixture of the probabilities themselves, without noise (Soft Thinking, arXiv 2505.15778)."""

from __future__ import annotations

from torch import Tensor

from softgrpo_kernels.methods.method import Method, Noise


class Plain(Method):
    """g' = log p."""

    noise = "none"
    code = 1
    why_untrained = (
        "its samples have no density; use gumbel, or rollout.soft.enabled=false for discrete "
        "rollouts"
    )

    def perturb(self, logp: Tensor, ids: Tensor, used: Tensor, noise: Noise) -> Tensor:
        return logp

    def rollout_logp(self, gprime: Tensor, gumbel: Tensor, scale: float) -> Tensor:
        return gprime
