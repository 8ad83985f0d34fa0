"""Checks and benchmarks: times, memory and errors, compared with other libraries."""
