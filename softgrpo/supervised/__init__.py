"""Supervised training on targets that are tokens or mixtures of tokens."""
