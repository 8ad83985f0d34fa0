"""Checks and benchmarks: times, memory and errors, beside other libraries."""
