"""The ops of a decoder: norms, activation, RoPE, attention, linear layers; for inference, and
`differentiable` for training on a GPU."""
