"""Which samples run, and in which pages of the KV cache. No torch."""
