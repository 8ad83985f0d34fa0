"""Read training examples from files, pairs, records and conversations, for use in your own training loop."""

from s0kernels.tuning.data import Example, read_examples

__all__ = ["Example", "read_examples"]
