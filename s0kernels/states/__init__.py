"""Learned states: the module that holds them, and the directories where they are saved."""

from s0kernels.states.module import S0States, states_size, warn_of_another_base

__all__ = ["S0States", "states_size", "warn_of_another_base"]
