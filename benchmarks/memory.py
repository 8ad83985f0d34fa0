"""Count the memory of training at published sizes, on tensors without memory.

    python benchmarks/memory.py [--models Qwen3.5-4B Falcon-H1-7B] [--examples 48]

A model on the meta device, in bf16, goes through forward, head and backward with examples of 300 tokens, half of them
predicted, and every new tensor is counted. That is the memory requested from torch's allocator, without the memory that
operators use inside. `one` is one example per forward; `4096` is 13 examples per forward, the most that fit into 4096
tokens; each also with layers checkpointed. `largest` is the size that the trainer would choose within 2, 8 and 48 GiB
beyond the weights. Writes benchmarks/results/memory-counted.json.
"""

import argparse
from pathlib import Path

import hybrids
import torch
from transformers import masking_utils

from s0kernels import S0States, swap_modules
from s0kernels.bench.measure import machine, write_json
from s0kernels.tuning import memory
from s0kernels.tuning.batches import PaddedBatch
from s0kernels.tuning.data import Example
from s0kernels.tuning.forwards import BYTES_PER_VALUE, Layers
from s0kernels.tuning.head import Head

RESULTS = Path(__file__).resolve().parent / "results"
LIMITS = (2, 8, 48)
LENGTH = 300
GIB = 2**30


class Unchecked(Head):
    """A head whose logits are not compared, because they have no values."""

    def _agrees(self, ids: torch.Tensor) -> bool:
        return True


class Batch(PaddedBatch):
    """Examples of one length. Indices are computed on a device where tensors have values."""

    def __init__(self, count: int):
        super().__init__([Example(list(range(2, 2 + LENGTH)), LENGTH // 2)] * count, torch.device("cpu"), 0)
        del self._inputs["attention_mask"]  # it is all ones
        self._inputs = {name: self._moved(value) for name, value in self._inputs.items()}
        self._before = tuple(map(self._moved, self._before))
        self.targets, self.device = self._moved(self.targets), torch.device("meta")

    @staticmethod
    def _moved(value):
        return value.to("meta") if isinstance(value, torch.Tensor) else value


def count(name: str, examples: int) -> dict:
    family, settings = hybrids.PUBLISHED[name]
    model = swap_modules(hybrids.build(family, settings, device="meta", dtype=torch.bfloat16))
    states = S0States.for_model(model).to("meta")
    head, layers = Unchecked(model, torch.zeros(1, 8, dtype=torch.long)), Layers(model)

    def needs(rows: int, checkpointed: bool) -> memory.Needs:
        layers.checkpoint(checkpointed)
        with states.attached(model), layers.recomputed():
            return memory.measure(Batch(rows), head)

    def cut(tokens: int) -> list[Batch]:
        rows = max(tokens // LENGTH, 1)
        return [Batch(min(rows, examples - start)) for start in range(0, examples, rows)]

    beside = BYTES_PER_VALUE * sum(state.numel() for state in states.parameters())
    found = {"weights_gib": sum(p.nbytes for p in model.parameters()) / GIB, "states_gib": beside / GIB, "forwards": []}
    ones = {}
    for checkpointed in (False, True):
        ones[checkpointed] = needs(1, checkpointed)._replace(beside=beside)
        for rows in (1, 13):
            whole = needs(rows, checkpointed)._replace(beside=beside)
            row = {"tokens": rows * LENGTH, "checkpointed": checkpointed, "kept_gib": whole.kept / GIB}
            row |= {"counted_gib": whole.of(Batch(rows)) / GIB}
            found["forwards"].append(row | {"expected_gib": ones[checkpointed].of(Batch(rows)) / GIB})
    found["largest"] = []
    for limit in LIMITS:
        choice = memory.choose(ones.get, cut, limit * GIB, 2**15)
        sizes = choice.sizes._asdict()
        found["largest"].append({"limit_gib": limit, **sizes, "peak_gib": choice.peak / GIB, "fits": choice.fits})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=list(hybrids.PUBLISHED), default=list(hybrids.PUBLISHED))
    parser.add_argument("--examples", type=int, default=48)
    options = parser.parse_args()
    from report import counted

    memory.UNCOUNTED = 1.0  # the factor is for resident memory
    masking_utils.find_packed_sequence_indices = lambda position_ids: None  # it would read values
    models = {name: count(name, options.examples) for name in options.models}
    results = {"machine": machine("cpu", "no"), "examples": options.examples, "models": models}
    print(counted(results))
    write_json(RESULTS / "memory-counted.json", results)


if __name__ == "__main__":
    main()
