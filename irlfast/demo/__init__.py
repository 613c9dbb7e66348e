"""The demonstrations, held-out rows and model shape that ``configs/irft.yaml`` trains on; ``generate.py`` wrote them."""
