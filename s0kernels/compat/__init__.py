"""The signatures of other libraries on top of `s0kernels.ops`: an import is all that changes."""
