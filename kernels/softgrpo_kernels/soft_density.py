"""Log-density of a recorded soft token of Gumbel noise."""

from __future__ import annotations

import math

from torch import Tensor

from softgrpo_kernels.methods import method_of
from softgrpo_kernels.methods.method import Rollout


def soft_density(
    logq: Tensor,
    gprime: Tensor,
    *,
    objective: str = "exact",
    noise_scale: float = 1.0,
    tau: float = 0.1,
    weight_floor: float = 0.0,
) -> Tensor:
    """Log-density of the recorded g' given the current log q, differentiable in logq.

    With u_i = (g'_i - log q_i) / c, c the noise scale, over the n live slots (g' not -inf):

    - ``exact``: sum_i (-u_i - exp(-u_i)) - n log c, the density of g';
    - ``concrete``: lgamma(n) - sum_i u_i - n LSE_i(-u_i) - (n - 1) log c, the density of g' modulo
      a common shift, which the mixture does not see (Maddison et al. 2017, ExpConcrete);
    - ``censored``: of g' as far as a mixture shows it whose weights below `weight_floor` times the
      largest are 0 (`methods.censored`); floor 1 is log q of slot 0, floor 0 is ``concrete``;
    - ``official``: log(q + 1e-6) for log q, u clamped to [-1.5, 3] (no gradient outside, nor within
      1e-3 of a bound, where clipped noise comes back), mean over the slots with log q > -3, 0 where
      there is none;
    - ``argmax``, ``lepo``: no densities, but the surrogates log q of slot 0 and sum_i w_i log q_i
      (`methods.argmax`, `methods.lepo`);
    - ``latent_grpo``: mean of -u_i - exp(-u_i), u_i = g'_i - log q_i, with log q over the whole
      vocabulary (`methods.latent_grpo`).

    Args:
        logq: [N, K], log q over the row's candidates (dead slots: anything), for ``latent_grpo``
            over the vocabulary.
        gprime: [N, K], as recorded; dead slots -inf.
        noise_scale: c > 0. tau, weight_floor: of the mixture, read by ``censored`` and ``lepo``.

    Returns:
        [N] in logq's dtype; 0 in rows without live slots; NaN, and so is the gradient, where a live
        slot holds a NaN.

    Raises:
        ValueError: an unknown objective, a noise scale that is no positive number, two shapes.
    """
    method = method_of("gumbel", objective)
    if not 0.0 < noise_scale < math.inf:
        raise ValueError(f"noise_scale must be > 0 and finite, not {noise_scale}")
    if logq.shape != gprime.shape or logq.dim() == 0:
        raise ValueError(
            f"need logq and gprime of one shape [N, K], got {list(logq.shape)} and "
            f"{list(gprime.shape)}"
        )
    return method.density(logq, gprime, Rollout(noise_scale, tau, weight_floor))
