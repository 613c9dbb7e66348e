"""irlfast: align language models from demonstrations alone, by inverse reinforcement learning."""

__version__ = "0.1.0"
