"""The decoder: one definition for engine and trainer; its weights, from and to Hugging Face."""
