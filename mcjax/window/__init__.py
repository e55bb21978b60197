"""The working context: what the LM sees, and its KV cache."""
