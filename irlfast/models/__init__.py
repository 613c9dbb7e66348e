"""Hugging Face models made ready: tokenizers, loading, LoRA, attention and masks. ``prepare`` is the one door."""
