"""The trainable policy and its update."""
