"""Helpers that every room uses: files, messages, the processes of a run, exit codes, endpoints of other models."""
