"""Random values, and results that may differ where another order of a sum crosses a rounding."""

import torch


def randn(*shape, dtype, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def ulps(a, b):
    """Distance in representable numbers of the dtype."""
    integer = {torch.bfloat16: torch.int16, torch.float32: torch.int32}[a.dtype]
    ordered = []
    for x in (a, b):
        bits = x.contiguous().view(integer).long()
        ordered.append(torch.where(bits < 0, -(bits & torch.iinfo(integer).max), bits))
    return (ordered[0] - ordered[1]).abs()


def assert_almost_bitwise(out, expected, tiny=0.0):
    """Equal bits but for the rare value whose fp32 intermediate, summed in another order, falls on
    the other side of a rounding."""
    distance = ulps(out, expected)[expected.abs() >= tiny]
    if out.dtype == torch.bfloat16:
        # A flip before the product with the weight moves the product by up to two.
        assert distance.max() <= 2
        assert (distance > 0).float().mean() <= 2e-3
    else:
        assert distance.max() <= 6


def assert_close(out, expected):
    """Looser, as a device's exp and sums differ more: of a bf16 result at most a few values lie on
    the other side of a rounding."""
    if out.dtype == torch.bfloat16:
        torch.testing.assert_close(out, expected, rtol=2**-7, atol=1e-6)
        assert (out != expected).float().mean() <= 5e-3
    else:
        torch.testing.assert_close(out, expected, rtol=2e-6, atol=1e-7)
