"""Log-probabilities and log-ratios from logits that exist already."""
