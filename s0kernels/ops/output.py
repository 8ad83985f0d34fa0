"""The result of a scan."""

from typing import NamedTuple

from torch import Tensor


class ScanOutput(NamedTuple):
    """`output` in the dtype of the inputs; `final_state` [NSEQ, ...] in fp32 (fp64 for fp64), or None if not
    requested."""

    output: Tensor
    final_state: Tensor | None
