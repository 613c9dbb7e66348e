"""Divergences between two distributions over the vocabulary, a policy's and a reference's, from hidden states."""
