"""Reinforcement learning of soft-thinking language models."""
