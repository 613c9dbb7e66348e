"""A run's folder: its record, the metrics log, the lock that keeps a second run out, the hub."""
