"""Training examples from files, pairs, records and conversations, for loops of one's own."""

from s0kernels.tuning.data import Example, read_examples

__all__ = ["Example", "read_examples"]
