"""The methods to compare: no tuning, S0, LoRA, prompt tuning, and an offset read at every step.

`tune(base, data)` of a method takes the examples of each seed and yields (seed, model to generate with) one after the
other. A model stays tuned until the next one is requested. Afterwards the base is unchanged.
"""

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from protocol import Base, fingerprint
from torch import Tensor, nn
from tqdm import tqdm

from s0kernels import S0States
from s0kernels.calls import state_dtype
from s0kernels.modules.gated_deltanet import S0GatedDeltaNet
from s0kernels.modules.mixer import S0Mixer
from s0kernels.tuning.batches import make_batches
from s0kernels.tuning.data import read_tasks

Data = Mapping[int, list[dict]]
Tuned = Iterator[tuple[int, nn.Module]]
TOKENS_PER_BATCH = 4096


@dataclass(frozen=True)
class Nothing:
    """The base without tuning."""

    padded: ClassVar[bool] = True

    def parameters(self, base: Base) -> int:
        return 0

    def tune(self, base: Base, data: Data) -> Tuned:
        yield from ((seed, base.model) for seed in data)


@dataclass(frozen=True)
class S0:
    """The learned initial state, with the trainer's defaults. One run learns all seeds, as tasks.

    `alpha` is the scale in use (None: that of the architecture). `at_alpha` uses that scale in training too, as in
    Algorithm 1 of the paper. `layers` is the part of the recurrent layers that learn. `normalize` divides by each
    layer's norm before scaling. Runs are kept in `folder` and not repeated.
    """

    alpha: float | None = None
    normalize: bool = False
    at_alpha: bool = False
    layers: str = "all"
    folder: Path | None = None
    padded: ClassVar[bool] = True

    def parameters(self, base: Base) -> int:
        states = S0States.for_model(base.model)
        return sum(states[layer].numel() for layer in part(list(states), self.layers))

    def tune(self, base: Base, data: Data) -> Tuned:
        trainer = base.trainer
        before, trainer.config = trainer.config, replace(trainer.config, alpha=self.alpha, normalize=self.normalize)
        try:
            named = {f"seed {seed}": found for seed, found in data.items()}
            scale = trainer.alpha if self.at_alpha else 1.0
            run = fingerprint([base.name, named, scale, self.layers])
            trainer.train(
                named,
                tokens_per_batch=TOKENS_PER_BATCH,
                scale=scale,
                layers=part(list(S0States.for_model(base.model)), self.layers),
                checkpoint=None if self.folder is None else self.folder / f"{run}.safetensors",
            )
            for seed in data:
                trainer.activate(f"seed {seed}")
                yield seed, base.model
        finally:
            trainer.deactivate()
            trainer.config = before


def part(layers: list[int], which: str) -> list[int]:
    """Return the early, middle or late third of the layers, or all layers."""
    first, second = -(-len(layers) // 3), len(layers) - len(layers) // 3
    thirds = {"early": layers[:first], "middle": layers[first:second], "late": layers[second:], "all": layers}
    if which not in thirds:
        raise ValueError(f"layers must be one of {', '.join(thirds)}, got {which!r}")
    return thirds[which]


@dataclass(frozen=True)
class LoRA:
    """Adapters on the attention layers, by PEFT. The defaults are the paper's: lora_alpha = 2 r, no dropout,
    on q, k, v, o of Qwen3.5 at 5e-4, on q, k, v and the input projection of the mixer of Falcon-H1 at 1e-4."""

    rank: int = 24
    lr: float | None = None
    steps: int = 50
    padded: ClassVar[bool] = True

    def config(self, base: Base):
        from peft import LoraConfig

        targets = ["q_proj", "k_proj", "v_proj", *(["in_proj"] if base.arch == "mamba2" else ["o_proj"])]
        return LoraConfig(
            task_type="CAUSAL_LM", r=self.rank, lora_alpha=2 * self.rank, lora_dropout=0.0, target_modules=targets
        )

    def parameters(self, base: Base) -> int:
        with _adapted(base, self.config(base), 0) as model:
            return _count(model)

    def tune(self, base: Base, data: Data) -> Tuned:
        lr = self.lr or (1e-4 if base.arch == "mamba2" else 5e-4)
        for seed, found in data.items():
            with _adapted(base, self.config(base), seed) as model:
                fit(base, model, _trainable(model), found, self.steps, lr, f"LoRA r{self.rank}, seed {seed}")
                yield seed, model


@dataclass(frozen=True)
class Prompt:
    """Prompt tuning by PEFT: embeddings learned in front of every prompt."""

    tokens: int = 32
    lr: float = 1e-2
    steps: int = 50
    padded: ClassVar[bool] = False  # the learned embeddings would be put before the pads

    def config(self, base: Base):
        from peft import PromptTuningConfig

        return PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=self.tokens, prompt_tuning_init="RANDOM")

    def parameters(self, base: Base) -> int:
        return self.tokens * base.model.get_input_embeddings().embedding_dim

    def tune(self, base: Base, data: Data) -> Tuned:
        for seed, found in data.items():
            with _adapted(base, self.config(base), seed) as model:
                fit(base, model, _trainable(model), found, self.steps, self.lr, f"prompt, seed {seed}")
                yield seed, model


@dataclass(frozen=True)
class StateOffset:
    """The state-offset variant of the paper. It learns an offset that is added to the state whenever it is read, o_t =
    scale (S_t + offset)^T q_t, instead of the initial state. The offset does not decay, and costs a product at every
    token."""

    alpha: float | None = None
    lr: float = 1e-3
    steps: int = 20
    l2: float = 5e-4
    padded: ClassVar[bool] = True

    def parameters(self, base: Base) -> int:
        return S0().parameters(base)

    def tune(self, base: Base, data: Data) -> Tuned:
        scale = base.trainer.alpha if self.alpha is None else self.alpha
        for seed, found in data.items():
            with offset(base.model) as offsets:
                fit(base, base.model, offsets, found, self.steps, self.lr, f"offset, seed {seed}", self.l2)
                with torch.no_grad():
                    for x in offsets:
                        x *= scale  # learned without a scale, and used at the scale of S0
                yield seed, base.model


@contextlib.contextmanager
def offset(model: nn.Module) -> Iterator[list[Tensor]]:
    """Yield the offsets [1, *state] of the recurrent layers of a swapped model. They are zero at first and read at
    every step."""
    mixers = [module for module in model.modules() if isinstance(module, S0Mixer)]
    offsets = []
    try:
        for mixer in mixers:
            shape = mixer.site.shapes[mixer.layer_idx]
            device = next(mixer.parameters()).device
            mixer.__dict__["offset"] = torch.zeros(shape, device=device, requires_grad=True)
            offsets.append(mixer.offset)
            reader = _OffsetDelta if isinstance(mixer, S0GatedDeltaNet) else _OffsetMamba
            mixer.__class__ = type(type(mixer).__name__, (reader, type(mixer)), {})
        yield offsets
    finally:
        for mixer in mixers[: len(offsets)]:
            mixer.__class__ = type(mixer).__mro__[2]
            del mixer.__dict__["offset"]


class _OffsetDelta:
    def scan(self, q, k, v, g, beta, rows):
        output = super().scan(q, k, v, g, beta, rows)
        x = q.to(state_dtype(q.dtype))
        x = x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt() * q.shape[-1] ** -0.5
        x = x.repeat_interleave(self.num_v_heads // self.num_k_heads, dim=2)
        return output + torch.einsum("bthk,hkv->bthv", x, self.offset).to(output.dtype)


class _OffsetMamba:
    def scan(self, x, dt, B, C, z, rows):
        output = super().scan(x, dt, B, C, z, rows)
        wide = C.to(state_dtype(C.dtype)).repeat_interleave(self.num_heads // self.n_groups, dim=2)
        read = torch.einsum("bthn,hpn->bthp", wide, self.offset)
        return output + (read if z is None else read * F.silu(z.to(read.dtype))).to(output.dtype)


@contextlib.contextmanager
def _adapted(base: Base, config, seed: int) -> Iterator[nn.Module]:
    """Yield the base's model with layers of PEFT, initialised from `seed`."""
    from peft import get_peft_model

    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        warnings.filterwarnings("ignore", "Position ids are not supported", UserWarning)  # there are no pads
        model = get_peft_model(base.model, config)
        try:
            yield model
        finally:
            if not config.is_prompt_learning:
                model.unload()


def fit(
    base: Base,
    model: nn.Module,
    parameters: list[Tensor],
    found: list[dict],
    steps: int,
    lr: float,
    label: str,
    l2: float = 0.0,
) -> list[float]:
    """Train other parameters than S0 with the loop of the trainer: the same loss over all examples at every step, Adam,
    and the gradient clipped to norm 1. Return the losses."""
    _, read = read_tasks(found, base.tokenizer, base.trainer.config.max_length)
    batches = make_batches(read, TOKENS_PER_BATCH, None, base.model, base.pad, base.trainer.device)
    optimizer = torch.optim.Adam(parameters, lr=lr)
    losses = []
    model.eval()
    for _ in tqdm(range(steps), desc=label, unit="step", leave=False):
        loss = 0.0
        for batch in batches:
            share = batch.losses(model)[0] / len(read)
            share.backward()
            loss += float(share.detach())
        if l2:
            (l2 * sum(p.square().sum() for p in parameters)).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss)
    return losses


def _trainable(model: nn.Module) -> list[Tensor]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in _trainable(model))
