"""A small paged engine for soft-thinking language models."""
