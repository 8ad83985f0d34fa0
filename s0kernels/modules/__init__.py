"""Replacements for the recurrent mixers of transformers that start every sequence from a learned state.

S0 enters once, before the first real token of every sequence:

- A row of a padded batch starts from S0 at its first real token. Pads on either side neither decay the state nor write
  to it, and the cached final state is that of the last real token.
- A cache that already holds a state (decoding, chunked prefill, the next turn) takes precedence: S0 is not injected
  again.
- A new cache, or one after `cache.reset()`, starts from S0.
- Sequences packed into a row (`cu_seq_lens_q`, `seq_idx`, or `position_ids` that start anew) each start from S0;
  scan, convolution and attention do not mix them. They cannot be combined with a cache or an attention mask. A model
  whose attention would mix them, or that does not pass their boundaries to its decoder, refuses them (see
  `swap_report`).
- A single token with a cache counts as a real token on a GPU, as it does in transformers. On a CPU its entry in the
  attention mask is read.
- The state of the convolution is separate and still starts from zero.
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
