"""Beside a run: what it would need, whether it works, whether engine and trainer agree."""
