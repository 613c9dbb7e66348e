"""What every room uses: files written whole, messages, the processes of a run, exit codes."""
