"""Rollouts: what an engine is asked for, and what it hands to the trainer."""
