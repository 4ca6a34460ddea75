"""The inference ops of a decoder: norms, activation, RoPE, attention, linear layers."""
