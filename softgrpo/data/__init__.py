"""Datasets, prompts, and which of them a step trains on."""
