"""Implementations of the ops. They are independent of each other; `s0kernels.ops.registry` loads them on demand."""
