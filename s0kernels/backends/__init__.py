"""Implementations of the ops. Thin, independent of each other, loaded on demand by `s0kernels.ops.registry`."""
