"""The signatures of other libraries on top of `s0kernels.ops`. Using them takes a change of the import only."""
