"""The comparison of the Triton soft step with the reference."""

import torch

from softgrpo_kernels import SoftToken, soft_token

EXACT = ("ids", "n", "token", "kind", "valid")
FLOATS = ("gprime", "weights", "logp", "token_logp", "lse", "entropy", "kept_mass")


def poisoned(logits, k_max, embed):
    """Room in which everything that is not written shows."""
    layout = SoftToken.layout(logits, k_max, embed, True, True, True)
    room = {n: torch.full(s[1], -99.0, device=logits.device).to(s[0]) for n, s in layout.items()}
    return SoftToken(**room)


def compare(device, logits, embed, *, k_max, rtol=2e-6, **settings):
    """Both back ends on the same arguments; returns the Triton one's result."""
    settings |= {"need_lse": True, "need_entropy": True, "need_kept_mass": True, "k_max": k_max}
    expected = soft_token(logits, embed, backend="reference", **settings)
    moved = {k: v.to(device) if torch.is_tensor(v) else v for k, v in settings.items()}
    logits, embed = logits.to(device), embed.to(device)
    out = poisoned(logits, k_max, embed)
    soft_token(logits, embed, backend="triton", out=out, **moved)
    for name in EXACT:
        assert torch.equal(getattr(out, name).cpu(), getattr(expected, name)), name
    for name in FLOATS:
        a, b = getattr(out, name).cpu(), getattr(expected, name)
        torch.testing.assert_close(a, b, rtol=rtol, atol=5e-6, equal_nan=True, msg=name)
    tolerance = 1e-2 if embed.dtype != torch.float32 else 1e-5
    torch.testing.assert_close(out.embed.cpu(), expected.embed, rtol=tolerance, atol=tolerance)
    return out
