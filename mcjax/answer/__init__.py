"""What of the history answers a prompt, and what is read of it."""
