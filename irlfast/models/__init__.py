"""A Hugging Face model made ready: load, save, LoRA, attention and masks, what its head computes."""
