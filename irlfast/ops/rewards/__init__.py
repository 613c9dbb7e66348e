"""Reward heads and discriminator losses, from hidden states."""
