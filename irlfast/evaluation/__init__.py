"""Held-out figures of a policy."""
