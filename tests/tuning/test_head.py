"""The head and its loss: they agree with the model's own logits, for all operations between hidden states and
logits."""

import threading

import pytest
import torch
import torch.nn.functional as F
from cases import error
from models import MODELS, every_family, every_model, tokens
from torch import nn

from s0kernels import S0States, swap_modules
from s0kernels.tuning import head
from s0kernels.tuning.batches import make_batches
from s0kernels.tuning.data import Example
from s0kernels.tuning.head import Head, cross_entropy

EXAMPLES = [Example(tokens(1, length, seed=length)[0].tolist(), length // 3) for length in (29, 12, 21, 2)]


class Adapter(nn.Module):
    """A head wrapped like adapters do."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base = base
        self.add = nn.Linear(base.in_features, base.out_features, bias=False)

    def forward(self, hidden):
        return self.base(hidden) + 0.5 * self.add(hidden)


class Capped:
    """A forward whose logits are capped, with or without a setting that says so."""

    def __init__(self, model, cap: float, setting: bool):
        self.forward, self.cap = model.forward, cap
        if setting:
            model.config.final_logit_softcapping = cap

    def __call__(self, *args, **kwargs):
        output = self.forward(*args, **kwargs)
        output.logits = torch.tanh(output.logits / self.cap) * self.cap
        return output


def plain(model):
    return None


def multiplied(model):
    model.config.lm_head_multiplier = model.model.lm_head_multiplier = 0.3


def tied(model):
    model.lm_head.weight = model.model.embed_tokens.weight


def adapted(model):
    model.lm_head = Adapter(model.lm_head)


def with_bias(model):
    model.lm_head.bias = nn.Parameter(torch.randn(model.config.vocab_size))


def capped(model):
    model.forward = Capped(model, 2.0, True)


def capped_in_silence(model):
    model.forward = Capped(model, 200.0, False)  # only large logits show it


def not_called(model):
    weight, model.lm_head = model.lm_head.weight, nn.Identity()
    forward = model.forward

    def multiply(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = F.linear(output.logits, weight)
        return output

    model.forward = multiply


def gone(model):
    model.get_output_embeddings = lambda: None


def own_losses(model, states, example: Example) -> tuple[torch.Tensor, list]:
    """Return the mean loss over the completion from all logits of the model, and the gradient of S0."""
    states.zero_grad()
    ids = torch.tensor([example.ids])
    with states.attached(model):
        logits = model(ids, use_cache=False).logits[0, :-1]
    first = max(example.prompt_length, 1)
    loss = F.cross_entropy(logits[first - 1 :].float(), ids[0, first:])
    loss.backward()
    return loss.detach(), [state.grad.clone() for state in states.parameters()]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("name", "change", "known"),
    [
        ("qwen", plain, True),
        ("qwen", tied, True),
        ("qwen", adapted, True),
        ("qwen", with_bias, True),
        ("qwen", capped, True),
        ("qwen", capped_in_silence, False),
        ("qwen", not_called, False),
        ("qwen", gone, False),
        ("falcon", plain, True),
        ("falcon", multiplied, True),
    ],
)
def test_losses_and_gradients_are_the_models_own(name, change, known, packed, monkeypatch):
    """Chunks have a few tokens, and the last one is shorter."""
    monkeypatch.setattr(head, "CHUNK_BYTES", 4 * 97 * 8)
    monkeypatch.setattr(head, "_PIECE", 97 * 3)
    model = MODELS[name]()
    change(model)
    model = swap_modules(model.requires_grad_(False))
    states = S0States.for_model(model)
    for layer in states:
        states[layer].data.normal_()
    truth = [own_losses(model, states, example) for example in EXAMPLES]
    (batch,) = make_batches(EXAMPLES, 4096, packed, model, 0, torch.device("cpu"))
    found = batch.head(model)
    assert found.known is known
    assert found.chunk == 8
    states.zero_grad()
    with states.attached(model):
        loss = batch.losses(model, 1, found)
        loss.sum().backward()
    assert error(loss.detach(), sum(each for each, _ in truth)) < 1e-5
    for i, state in enumerate(states.parameters()):
        assert error(state.grad, sum(grads[i] for _, grads in truth)) < 1e-5
    with torch.no_grad(), states.attached(model):
        assert torch.equal(batch.losses(model, 1, found), loss)


@every_model
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_head_of_every_family_is_known(name, dtype):
    """This includes models that return fp32 logits in any dtype."""
    model = swap_modules(MODELS[name]().to(dtype))
    assert Head(model, torch.tensor([EXAMPLES[0].ids])).known


def test_the_head_of_a_model_that_is_not_swapped_is_known():
    assert Head(MODELS["qwen"](), torch.tensor([EXAMPLES[0].ids])).known


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_errors_are_those_of_torch_in_the_same_dtype(dtype):
    """The errors of losses and of the gradient of hidden states are measured against fp64."""
    model = swap_modules(MODELS["qwen"]().to(dtype).requires_grad_(False))
    found = Head(model, torch.tensor([EXAMPLES[0].ids]))
    hidden = torch.randn(40, 32).to(dtype)
    targets, weights = torch.randint(97, (40,)), torch.rand(40)

    def run(loss, where):
        rows = hidden.to(where).requires_grad_()
        losses = loss(rows)
        (losses * weights.to(losses.dtype)).sum().backward()
        return losses.detach(), rows.grad

    weight = model.lm_head.weight.detach()
    truth = run(lambda rows: F.cross_entropy(rows @ weight.double().T, targets, reduction="none"), torch.float64)
    theirs = run(lambda rows: F.cross_entropy((rows @ weight.T).float(), targets, reduction="none"), dtype)
    ours = run(lambda rows: cross_entropy(found, rows, targets), dtype)
    for a, b, c in zip(ours, theirs, truth, strict=True):
        assert a.dtype == b.dtype
        assert error(a, c) <= 2 * error(b, c) + torch.finfo(b.dtype).eps


@every_family
def test_other_threads_use_the_model_meanwhile(name):
    model = swap_modules(MODELS[name]().requires_grad_(False))
    ids = tokens(2, 9)
    found, truth, seen = Head(model, ids), model(ids).logits, []
    decoder = model.get_decoder()

    def meanwhile(*_):
        handle.remove()
        thread = threading.Thread(target=lambda: seen.append(model(ids).logits))
        thread.start()
        thread.join()

    handle = decoder.register_forward_hook(meanwhile)
    assert found.read(input_ids=ids).shape == (2, 9, model.config.hidden_size)
    assert torch.equal(seen[0], truth)
    assert torch.equal(model(ids).logits, truth), "nothing is left of it"


def test_few_logits_exist_at_a_time(monkeypatch):
    """The head computes one chunk at a time, and nothing for prompts."""
    monkeypatch.setattr(head, "CHUNK_BYTES", 4 * 97 * 8)
    model = swap_modules(MODELS["qwen"]().requires_grad_(False))
    (batch,) = make_batches(EXAMPLES, 4096, False, model, 0, torch.device("cpu"))
    found, sizes = batch.head(model), []
    handle = model.lm_head.register_forward_hook(lambda module, args, output: sizes.append(output.numel() // 97))
    batch.losses(model, 1, found)
    handle.remove()
    predicted = sum(len(example.ids) - max(example.prompt_length, 1) for example in EXAMPLES)
    assert sizes[0] == 0, "the forward itself needs none"
    assert sum(sizes) == predicted
    assert max(sizes) == 8
