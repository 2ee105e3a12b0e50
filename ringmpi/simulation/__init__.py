"""What a call would do on machines that are not there: its steps, with speeds, jitter, and ranks and links that are slow."""
