"""What is minimised, as formulas: SFT, pair losses, reward losses, policy losses. Nothing else."""
