"""Frozen models asked for answers (Transformers, vLLM) and for scores (reference, rewards)."""
