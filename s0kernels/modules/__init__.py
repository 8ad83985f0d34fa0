"""Replacements for the recurrent mixers of transformers that start every sequence from a learned state.

S0 enters once, before the first real token of every sequence:

- A row of a padded batch starts from S0 at its first real token. Pads neither decay the state nor write to it, on
  whichever side they are, and a cached final state is that of the last real token.
- A cache that already holds a state (decoding, chunked prefill, the next turn) wins: S0 is not injected again.
- A new cache, or one after `cache.reset()`, starts from S0.
- Sequences packed into a row (`cu_seq_lens_q`, `seq_idx`, or `position_ids` that start anew) each start from S0;
  scan, convolution and attention keep them apart. This excludes a cache and an attention mask. A model whose attention
  does not keep them apart, or that does not tell its decoder where they begin, refuses them (`swap_report` says so).
- A single token handed in with a cache is taken for a real one on a GPU, as transformers takes it; on a CPU its place
  in the attention mask is looked at.
- The state of the convolution is separate and starts from zero as ever.
"""

from s0kernels.modules.families import FAMILIES
from s0kernels.modules.gated_deltanet import S0GatedDeltaNet
from s0kernels.modules.mamba2 import S0Mamba2Mixer
from s0kernels.modules.self_check import SwapReport
from s0kernels.modules.swap import restore_modules, swap_modules, swap_report

__all__ = [
    "FAMILIES",
    "S0GatedDeltaNet",
    "S0Mamba2Mixer",
    "SwapReport",
    "restore_modules",
    "swap_modules",
    "swap_report",
]
