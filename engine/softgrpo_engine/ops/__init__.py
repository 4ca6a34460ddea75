"""The ops of a decoder: norms, activation, RoPE, attention, linear layers; for inference, and
`differentiable` and `linear` for training."""
