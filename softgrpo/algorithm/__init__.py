"""The mathematics of a step, on tensors: densities, advantages, corrections, the loss."""
