"""What a call would do on a machine that need not be there, step by step, and what jitter or a slow rank does to it."""
