"""Training in more than one process."""

import json

import pytest
import torch
import transformers
from models import MODELS, tokenizer
from surroundings import python

on_cpu_cores = pytest.mark.skipif(
    torch.cuda.is_available(), reason="two processes on CPU cores; there is a GPU for them to take"
)

TWO_PROCESSES = ["-m", "torch.distributed.run", "--nproc-per-node=2"]
TWO = """
import json, sys, torch
torch.set_num_threads(1)
from torch.nn.parallel import DistributedDataParallel
from models import MODELS, gradients, random_states, tokens
from s0kernels import swap_modules
from s0kernels.tuning.loop import processes
from trainers import OTHERS, PAIRS, trainer
place = processes()
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
        group = torch.distributed.new_group()  # its own, which it does not let go of
        both, share = DistributedDataParallel(both, process_group=group), ids.chunk(2)[place.process_index]
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


@pytest.mark.slow
@on_cpu_cores
def test_two_processes_end_with_the_states_of_one(tmp_path):
    """The files have the same bits and are written once. All processes stop if one does. Errors are raised in every
    process. The gradient under DistributedDataParallel is the same."""
    (tmp_path / "run.py").write_text(TWO)
    ways = {"one": [], "two": TWO_PROCESSES}
    for way, launcher in ways.items():
        done = python(*launcher, str(tmp_path / "run.py"), str(tmp_path / way))
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count(f"processes: {1 if way == 'one' else 2}") == (1 if way == "one" else 2)
        assert done.stderr.count("S0 tuning: 0 of 4 steps") == 2, "said once a run"
    files = sorted(str(file.relative_to(tmp_path / "one")) for file in (tmp_path / "one").rglob("*") if file.is_file())
    assert len(files) == 2 * (3 + 2 * 3 + 1 + 1)
    for file in files:
        a, b = tmp_path / "one" / file, tmp_path / "two" / file
        assert a.read_bytes() == b.read_bytes(), file


TUNE = """
import atexit, contextlib, glob, sys
from pathlib import Path
from s0kernels.cli import main

def report():
    names = []
    for file in glob.glob("/proc/self/task/*/comm"):
        with contextlib.suppress(OSError):  # a thread that has just ended
            names.append(Path(file).read_text().strip())
    print(f"left: {[name for name in names if 'gloo' in name]}\\n", end="")  # in one write

atexit.register(report)  # runs after what is registered later
sys.exit(main(sys.argv[1:]))
"""


@on_cpu_cores
def test_the_command_line_ends_the_process_group_that_it_makes(tmp_path):
    """A gloo thread that is alive when Python shuts down may abort the process, and does so under load."""
    MODELS["falcon"]().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    lines = [{"prompt": "Q: 1+1\nA:", "completion": " 2"}, {"prompt": "Q: 2+2\nA:", "completion": " 4"}]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "tune.py").write_text(TUNE)
    arguments = ["tune", str(tmp_path / "model"), str(tmp_path / "data.jsonl"), str(tmp_path / "out"), "--steps", "2"]
    done = python(*TWO_PROCESSES, str(tmp_path / "tune.py"), *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("left: []") == 2, done.stdout
    assert done.stdout.count("loss ") == 1, "one process reports"
    assert (tmp_path / "out" / "states.safetensors").exists()


def test_processes_of_the_tests_run_what_is_tested():
    """For example, they use the same version of transformers as this process."""
    done = python("-c", "import transformers; print(transformers.__version__)", cwd="/")
    assert done.stdout.strip() == transformers.__version__, done.stderr


DEALT_OUT = """
import json, sys, torch
torch.set_num_threads(1)
from s0kernels.tuning.processes import Processes
from test_collect import OPTIONS, PROBLEMS, check
from test_evaluation import learned
place, folder = Processes(), sys.argv[1]
one, answered = learned("falcon"), []
one.model.register_forward_hook(lambda *_: answered.append(1))
found = one.collect(PROBLEMS, check, rows=4, out=f"{folder}/found.jsonl", **OPTIONS)
few = one.collect(PROBLEMS, check, rows=8, solutions=3, **OPTIONS)
evaluation = one.evaluate(PROBLEMS, check=check, rows=2, max_new_tokens=6, out=f"{folder}/e.jsonl", progress=False)
assert all(other == (found, few) for other in place.share((found, few)))

def breaks(problem, answer):
    if problem["id"] == "p5":
        raise ZeroDivisionError("broken")
    return False

for out in (f"{folder}/breaks.jsonl",) * 2:  # also when it goes on
    try:
        one.collect(PROBLEMS, breaks, rows=4, out=out, **OPTIONS)
    except RuntimeError as error:
        message = str(error)
assert "failed on problem 'p5': ZeroDivisionError: broken" in message, message
assert all(place.share(bool(answered))), "each does a share"
if place.is_main:
    with open(f"{folder}/all.json", "w") as file:
        json.dump([found, few, evaluation.to_dict(), evaluation.answers], file)
"""


@pytest.mark.slow
@on_cpu_cores
def test_problems_are_dealt_out_and_the_list_is_the_same(tmp_path):
    (tmp_path / "dealt.py").write_text(DEALT_OUT)
    files = {}
    for count in (1, 2):
        folder = tmp_path / str(count)
        folder.mkdir()
        launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={count}"] if count > 1 else []
        done = python(*launcher, str(tmp_path / "dealt.py"), str(folder))
        assert done.returncode == 0, done.stderr[-3000:]
        names = ("all.json", "found.jsonl", "found.state.jsonl", "e.jsonl")
        files[count] = {name: sorted((folder / name).read_text().splitlines()) for name in names}
        assert (folder / "found.jsonl").read_text().splitlines() == [
            json.dumps(record) for record in json.loads((folder / "all.json").read_text())[0]
        ]
    assert files[1] == files[2]
