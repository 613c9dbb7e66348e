"""Log-ratios of sequences and losses on pairs of them, from hidden states."""
