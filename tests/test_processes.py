"""Training in more than one process."""

import pytest
import torch
from test_surroundings import python

TWO = """
import json, sys, torch
torch.set_num_threads(1)
from torch.nn.parallel import DistributedDataParallel
from accelerate import PartialState
from models import MODELS, gradients, random_states, tokens
from s0kernels import swap_modules
from test_training import OTHERS, PAIRS, trainer
place = PartialState(cpu=True)
for name in ("qwen", "falcon"):
    tuned, calls = trainer(name), []
    tuned.model.register_forward_hook(lambda *_: calls.append(1))
    tuned.train(PAIRS, progress=False)
    assert len(calls) >= 2 + 4, "two forwards show that S0 has an effect; then a share of the batches in every step"
    tuned.train(PAIRS, tokens_per_batch=30)
    tuned.save(f"{sys.argv[1]}/{name}")
    tasks = trainer(name)
    stop = lambda entry, _: place.is_main_process and entry["step"] == 2  # one process alone wants to stop
    options = {"tokens_per_batch": 30, "progress": False, "callbacks": [stop]}
    tasks.train({"a": PAIRS, "b": OTHERS}, checkpoint=f"{sys.argv[1]}/{name}.run", **options)
    assert len(tasks.history) == 3
    tasks.save(f"{sys.argv[1]}/{name}-tasks")

    class Both(torch.nn.Module):
        def __init__(self, model, states):
            super().__init__()
            self.model, self.states = model, states

        def forward(self, ids):
            with self.states.attached(self.model):
                return self.model(ids, use_cache=False).logits

    model = swap_modules(MODELS[name]()).requires_grad_(False)
    states, ids = random_states(model), tokens(4, 12)
    truth = gradients(model, states, ids)
    states.zero_grad()
    both, share = Both(model, states), ids
    if place.num_processes > 1:
        both, share = DistributedDataParallel(both), ids.chunk(place.num_processes)[place.process_index]
    (place.num_processes * both(share).log_softmax(-1)[..., 7].sum()).backward()
    for layer, grad in zip(states, truth, strict=True):
        assert (states[layer].grad - grad).abs().max() <= 1e-5 * grad.abs().max()
index = place.process_index
for data, options, settings in (
    (PAIRS[: 2 + index], {}, {}),
    (PAIRS, {"tokens_per_batch": 30 - 9 * index}, {}),
    (PAIRS, {}, {"n_steps": 2 + index}),
):
    try:
        trainer("qwen", **settings).train(data, progress=False, **options)
        assert place.num_processes == 1
    except ValueError as error:
        assert "not given the same data" in str(error)
print(f"processes: {place.num_processes}\\n", end="", flush=True)  # in one write
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="two processes on CPU cores; there is a GPU for them to take")
def test_two_processes_end_with_the_states_of_one(tmp_path):
    """The same bits in the same files, written once; a stop in all when one wants it; errors in every process; and the
    same gradient under DistributedDataParallel."""
    (tmp_path / "run.py").write_text(TWO)
    ways = {"one": [], "two": ["-m", "torch.distributed.run", "--nproc-per-node=2"]}
    for way, launcher in ways.items():
        done = python(*launcher, str(tmp_path / "run.py"), str(tmp_path / way))
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count(f"processes: {1 if way == 'one' else 2}") == (1 if way == "one" else 2)
        assert done.stderr.count("0/4 [") == 2, "one progress bar a run"
    files = sorted(str(file.relative_to(tmp_path / "one")) for file in (tmp_path / "one").rglob("*") if file.is_file())
    assert len(files) == 2 * (3 + 2 * 3 + 1 + 1)
    for file in files:
        a, b = tmp_path / "one" / file, tmp_path / "two" / file
        assert a.read_bytes() == b.read_bytes(), file
