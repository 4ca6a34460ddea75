"""A planned step on the device: inputs, forward pass, draw, record."""
