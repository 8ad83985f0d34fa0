"""Learning S0: examples, memory, the loop, and the trainer."""
