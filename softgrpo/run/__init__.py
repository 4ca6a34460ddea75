"""A run on the disk: its folder, checkpoints, what it leaves, how it is interrupted."""
