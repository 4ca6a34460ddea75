"""What the decoder needs in training only."""
