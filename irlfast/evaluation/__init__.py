"""Measure a policy on held-out demonstrations."""
