"""Measure models on prompts, with intervals and paired tests; compare them by a judge and by leaderboards."""
