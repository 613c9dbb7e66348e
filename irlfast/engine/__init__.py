"""The loop and what keeps it alive: fit, step, checkpoint, memory."""
