"""What a layer launches in a pass of training: forward, forward again, backward."""

import torch
from tiny_decoder import make_decoder

from softgrpo_engine.training.group_attention import GroupAttention

# Kernels of ours, by name; the rest are PyTorch's.
OURS = {
    "rms_norm_kernel": 4,  # two norms, each twice
    "rms_norm_backward_kernel": 2,
    "rotate_heads_kernel": 2,
    "rotate_heads_backward_kernel": 1,
    "silu_mul_kernel": 2,
    "silu_mul_backward_kernel": 1,
}


def launches_of_a_pass(simulated_gpu, layers):
    """Biases of attention, float32 masters, computed in bfloat16."""
    decoder = make_decoder(num_hidden_layers=layers, attention_bias=True).cuda().train()
    decoder.gradient_checkpointing = True
    attention = GroupAttention([3, 2], [[4, 2], [5]], 4, 2, "cuda")
    embeds = torch.randn(16, 32).bfloat16().cuda().requires_grad_()
    positions = torch.arange(16).cuda()
    with simulated_gpu.counting() as counts:
        decoder(embeds, positions, attention).sum().backward()
    assert counts.waits.total() == 0, counts.table()
    return counts.launches


def test_launches_of_a_layer(simulated_gpu):
    """The difference of two depths; 216 where the layers are PyTorch's operators. Of the 73 are 35
    casts of weights, biases and their gradients."""
    counts = launches_of_a_pass(simulated_gpu, 3)
    counts.subtract(launches_of_a_pass(simulated_gpu, 2))
    assert {name: n for name, n in counts.items() if n and name.endswith("_kernel")} == OURS
    assert counts.total() <= 73, counts
