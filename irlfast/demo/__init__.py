"""The demonstrations, held-out rows and model shape of ``configs/irft.yaml``; ``generate.py`` wrote the rows."""
