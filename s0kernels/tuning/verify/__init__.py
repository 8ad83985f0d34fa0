"""Decide which answers are right: checkers, and the sandbox that runs code written by models."""
