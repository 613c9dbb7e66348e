"""The data of ``configs/irft.yaml``: demonstrations and held-out rows (by ``generate.py``), and the model's shape."""
