"""Frozen models generate answers (by Transformers or vLLM) and score them (reference log-probabilities, rewards)."""
