"""The ops in plain PyTorch: the meaning of every kernel, on any device, up to float64."""
