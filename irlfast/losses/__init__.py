"""The losses, as formulas: of SFT, of pairs, of rewards and of policies. Nothing else."""
