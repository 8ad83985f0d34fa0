"""Kernels and tools that let hybrid recurrent-attention language models start from a learned initial state S0."""

__version__ = "0.1.0"
