"""S0 tuning: learn the initial states of a frozen hybrid model from a few verified solutions."""

import math
import numbers
import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from s0kernels._files import read_directory
from s0kernels.config import S0Config
from s0kernels.modules.families import DEFAULT_ALPHA
from s0kernels.modules.swap import find_site, layer_devices, swap_modules
from s0kernels.states import S0States


class S0Trainer:
    """Trains the initial states of a model, and uses them. The API of the `s0-tuning` package.

    Args:
        model: a causal language model of transformers, of a supported family. Its mixers are swapped in place.
        tokenizer: its tokenizer.
        config: settings; the defaults are those of the method.

    The base weights get no gradient and do not change.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, config: S0Config | None = None):
        self.model = swap_modules(model)
        self.tokenizer = tokenizer
        if config is not None and not isinstance(config, S0Config):
            raise TypeError(f"S0Trainer: config must be an S0Config, got {type(config).__name__}")
        self.config = S0Config() if config is None else config
        self._arch = find_site(self.model).arch
        #: one dict per training step: step, loss (mean over examples), grad_norm (before clipping)
        self.history: list[dict[str, float]] = []
        self._states: S0States | None = None
        self._attached: S0States | None = None

    @classmethod
    def from_pretrained(cls, model_name: str, config: S0Config | None = None, **model_kwargs: Any) -> "S0Trainer":
        """Load model and tokenizer through transformers' Auto classes.

        `model_kwargs` go to `AutoModelForCausalLM.from_pretrained`. Unless they say otherwise the model is bf16 spread
        by `device_map="auto"` where there is a GPU, and fp32 on the CPU where there is none.
        """
        from transformers import AutoModelForCausalLM, AutoTokenizer

        gpu = torch.cuda.is_available()
        if "torch_dtype" not in model_kwargs:
            model_kwargs.setdefault("dtype", torch.bfloat16 if gpu else torch.float32)
        if gpu:
            model_kwargs.setdefault("device_map", "auto")
        tokenizer = AutoTokenizer.from_pretrained(model_name)
        model = AutoModelForCausalLM.from_pretrained(model_name, **model_kwargs)
        return cls(model.eval(), tokenizer, config)

    @property
    def device(self) -> torch.device:
        device = next(self.model.parameters()).device
        return next(iter(layer_devices(self.model).values())) if device.type == "meta" else device

    @property
    def states(self) -> S0States | None:
        """The trained or loaded states, unscaled; None before `train` or `load`."""
        return self._states

    @property
    def alpha(self) -> float:
        """The scale that `activate` uses: the config's, or the default of the architecture."""
        return DEFAULT_ALPHA[self._arch] if self.config.alpha is None else self.config.alpha

    @property
    def active(self) -> bool:
        """Whether sequences start from this trainer's states; another may have attached its own to the model."""
        site = find_site(self.model)
        attachment = None if site is None else site.attachment
        return attachment is not None and attachment.owner is self._attached

    # Training

    def train(
        self, data: Sequence[tuple[str, int]], *, tokens_per_batch: int = 4096, progress: bool = True
    ) -> dict[str, float]:
        """Learn S0 from zero on (text, prompt_length) pairs.

        Args:
            data: the whole text and the number of its first tokens that are the prompt, which is not learned.
            tokens_per_batch: examples are padded together up to this many tokens per forward. The result does not
                depend on it but for rounding: each step's loss is the mean over all examples of each example's mean
                cross-entropy per completion token.
            progress: show a progress bar.

        Returns:
            `final_loss`, the loss of the last step before its update, and `avg_state_norm`, the mean norm of a
            layer's state. The losses of all steps are in `history`.

        Raises:
            ValueError: no data, or an example with nothing to predict (named by its index).
            RuntimeError: a perturbed S0 leaves the logits as they are, or the loss is not finite.
        """
        batches = self._batches(data, tokens_per_batch)
        was_active = self.active
        self.deactivate()
        try:
            with _Frozen(self.model), torch.enable_grad():
                self._states, self.history = self._learn(batches, progress)
                final_loss = self.history[-1]["loss"] if self.history else self._loss(batches)
        finally:
            if was_active:
                self.activate()
        norms = [float(state.detach().norm()) for state in self._states.parameters()]
        return {"final_loss": final_loss, "avg_state_norm": sum(norms) / len(norms)}

    def _learn(self, batches: list["_Batch"], progress: bool) -> tuple[S0States, list[dict[str, float]]]:
        config, history = self.config, []
        states = S0States.for_model(self.model)
        optimizer = torch.optim.Adam(states.parameters(), lr=config.lr)
        with states.attached(self.model):
            self._check_effect(states, batches[0])
            # transformers checkpoints layers in training mode only
            self.model.train(any(getattr(module, "gradient_checkpointing", False) for module in self.model.modules()))
            bar = tqdm(range(config.n_steps), desc="S0 tuning", unit="step", disable=not progress)
            for step in bar:
                optimizer.zero_grad()
                loss = self._accumulate(batches)
                if not math.isfinite(loss):
                    raise RuntimeError(f"S0Trainer.train: the loss is {loss} at step {step}")
                (config.l2_lambda * sum(state.square().sum() for state in states.parameters())).backward()
                norm = float(nn.utils.clip_grad_norm_(states.parameters(), config.grad_clip))
                optimizer.step()
                history.append({"step": step, "loss": loss, "grad_norm": norm})
                bar.set_postfix(loss=f"{loss:.4f}")
        return states, history

    def evaluate(self, data: Sequence[tuple[str, int]], *, tokens_per_batch: int = 4096) -> float:
        """The loss of `train` (without the L2 term) on `data`, with the states as they are active now."""
        with _Frozen(self.model):
            return self._loss(self._batches(data, tokens_per_batch))

    def _accumulate(self, batches: list["_Batch"]) -> float:
        """Gradients of the mean loss over all examples, added batch by batch; the loss."""
        count = sum(len(batch.ids) for batch in batches)
        total = 0.0
        for batch in batches:
            losses = batch.losses(self.model)
            (losses.sum() / count).backward()
            total += float(losses.detach().sum())
        return total / count

    @torch.no_grad()
    def _loss(self, batches: list["_Batch"]) -> float:
        losses = torch.cat([batch.losses(self.model) for batch in batches])
        return float(losses.sum()) / len(losses)

    @torch.no_grad()
    def _check_effect(self, states: S0States, batch: "_Batch") -> None:
        """Refuse to train where S0 does not reach the logits: a run without effect would end without an error."""
        batch = batch.first(1)
        before = batch.logits(self.model)
        generator = torch.Generator().manual_seed(0)
        for state in states.parameters():
            state.copy_(torch.randn(state.shape, generator=generator))
        after = batch.logits(self.model)
        for state in states.parameters():
            state.zero_()
        if torch.equal(before, after):
            raise RuntimeError(
                "S0Trainer.train: a random initial state leaves the logits unchanged, so there is nothing to learn. "
                "Either the mixers were replaced after swap_modules, or the model forgets its state at once "
                "(decays near zero)."
            )

    def _batches(self, data: Sequence[tuple[str, int]], tokens_per_batch: int) -> list["_Batch"]:
        examples = [self._tokenize(i, example) for i, example in enumerate(data)]
        if not examples:
            raise ValueError("S0Trainer: data is empty")
        if isinstance(tokens_per_batch, bool) or not isinstance(tokens_per_batch, int) or tokens_per_batch < 1:
            raise ValueError(f"S0Trainer: tokens_per_batch must be a positive int, got {tokens_per_batch!r}")
        examples.sort(key=lambda example: len(example[0]))
        groups: list[list] = [[]]
        for example in examples:
            if groups[-1] and (len(groups[-1]) + 1) * len(example[0]) > tokens_per_batch:
                groups.append([])
            groups[-1].append(example)
        pad = next((i for i in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id) if i is not None), 0)
        return [_Batch.of(group, pad, self.device) for group in groups]

    def _tokenize(self, index: int, example: tuple[str, int]) -> tuple[list[int], int]:
        name = f"S0Trainer: data[{index}]"
        if not isinstance(example, (tuple, list)) or len(example) != 2:
            raise TypeError(f"{name} must be a pair (text, prompt_length), got {type(example).__name__}")
        text, prompt_length = example
        if (
            not isinstance(text, str)
            or isinstance(prompt_length, bool)
            or not isinstance(prompt_length, numbers.Integral)
        ):
            raise TypeError(
                f"{name} must be a pair (str, int), got ({type(text).__name__}, {type(prompt_length).__name__})"
            )
        if prompt_length < 0:
            raise ValueError(f"{name}: prompt_length must not be negative, got {prompt_length}")
        ids = self.tokenizer(text, truncation=True, max_length=self.config.max_length)["input_ids"]
        if max(prompt_length, 1) >= len(ids):
            raise ValueError(
                f"{name} has nothing to predict: prompt_length is {prompt_length}, and the text has {len(ids)} tokens "
                f"(max_length {self.config.max_length})"
            )
        return ids, int(prompt_length)

    # Using

    def activate(self) -> None:
        """Start every sequence from the trained states times `alpha`, until `deactivate`."""
        if self.active:
            return
        if self._states is None:
            raise RuntimeError("S0Trainer.activate: there are no states; call train() or load() first")
        states = self._states
        if self.config.normalize:
            states = S0States({layer: _unit(states[layer].detach()) for layer in states}, states.arch)
        states.attach(self.model, scale=self.alpha)
        states.requires_grad_(False)  # using the states builds no graph
        self._attached = states

    def deactivate(self) -> None:
        """Start from zero states again."""
        if self._attached is not None:
            self._attached.detach()
            self._attached.requires_grad_(True)
            self._attached = None

    def generate(self, prompt: str | list[str], max_new_tokens: int = 512, **kwargs: Any) -> str | list[str]:
        """Continue a prompt, or a list of prompts as one left-padded batch; the new text only.

        `kwargs` go to `model.generate`. Several returned sequences per prompt come one after the other.
        """
        prompts = [prompt] if isinstance(prompt, str) else prompt
        if not isinstance(prompts, list) or not prompts or not all(isinstance(text, str) for text in prompts):
            raise TypeError(f"S0Trainer.generate: prompt must be a string or a list of them, got {prompt!r}")
        encoded = [
            self.tokenizer(text, truncation=True, max_length=self.config.max_length)["input_ids"] for text in prompts
        ]
        if not all(encoded):
            raise ValueError(f"S0Trainer.generate: prompt {prompts[encoded.index([])]!r} has no tokens")
        kwargs.setdefault("pad_token_id", self.tokenizer.pad_token_id)
        if kwargs["pad_token_id"] is None:
            kwargs["pad_token_id"] = self.tokenizer.eos_token_id
        width = max(len(ids) for ids in encoded)
        ids = torch.tensor([[kwargs["pad_token_id"] or 0] * (width - len(row)) + row for row in encoded])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in encoded])
        with torch.no_grad():
            out = self.model.generate(
                input_ids=ids.to(self.device),
                attention_mask=mask.to(self.device),
                max_new_tokens=max_new_tokens,
                **kwargs,
            )
        texts = self.tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)
        return texts[0] if isinstance(prompt, str) and len(texts) == 1 else texts

    # Files

    def save(self, path: str | os.PathLike) -> None:
        """Write states and config to the directory `path`; see `S0States.save`."""
        if self._states is None:
            raise RuntimeError("S0Trainer.save: there are no states; call train() or load() first")
        self._states.save(path, config=self.config)

    def load(self, path: str | os.PathLike) -> None:
        """Read states and config from a directory. Where states are active, the new ones take their place."""
        states = S0States.load(path, self.model)
        *_, config = read_directory(path, self._arch)
        config = self.config if config is None else S0Config.from_dict(config)
        was_active = self.active
        self.deactivate()
        self._states, self.config = states, config
        if was_active:
            self.activate()


class _Batch:
    """Right-padded examples. The model sees every token; the loss looks at the completions."""

    def __init__(self, ids: Tensor, mask: Tensor, predicted: Tensor):
        self.ids, self.mask = ids, mask
        self.predicted = predicted  # [B, T] True where a token is to be predicted
        #: logits are wanted from here on
        self.start = int(predicted.any(0).nonzero()[0]) - 1

    @classmethod
    def of(cls, examples: list[tuple[list[int], int]], pad: int, device: torch.device) -> "_Batch":
        width = max(len(ids) for ids, _ in examples)
        ids = torch.tensor([row + [pad] * (width - len(row)) for row, _ in examples], device=device)
        lengths = torch.tensor([len(row) for row, _ in examples], device=device)[:, None]
        prompts = torch.tensor([max(prompt, 1) for _, prompt in examples], device=device)[:, None]
        place = torch.arange(width, device=device)
        return cls(ids, (place < lengths).long(), (place >= prompts) & (place < lengths))

    def first(self, count: int) -> "_Batch":
        return _Batch(self.ids[:count], self.mask[:count], self.predicted[:count])

    def logits(self, model: nn.Module) -> Tensor:
        """[B, T - start, vocabulary]."""
        return model(
            input_ids=self.ids, attention_mask=self.mask, use_cache=False, logits_to_keep=self.ids.shape[1] - self.start
        ).logits

    def losses(self, model: nn.Module) -> Tensor:
        """[B] mean cross-entropy of each example's completion tokens, in fp32."""
        logits = self.logits(model)[:, :-1].float()
        targets, wanted = self.ids[:, self.start + 1 :], self.predicted[:, self.start + 1 :]
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
        return losses.masked_fill(~wanted, 0.0).sum(1) / wanted.sum(1)


class _Frozen:
    """Weights without gradients and in evaluation mode; afterwards everything is as it was."""

    def __init__(self, model: nn.Module):
        self.model = model

    def __enter__(self) -> None:
        self._trainable = [p for p in self.model.parameters() if p.requires_grad]
        self._modes = {module: module.training for module in self.model.modules()}
        for parameter in self._trainable:
            parameter.requires_grad_(False)
        self.model.eval()

    def __exit__(self, *_) -> None:
        for parameter in self._trainable:
            parameter.requires_grad_(True)
        for module, training in self._modes.items():
            module.training = training


def _unit(state: Tensor) -> Tensor:
    """[1, ...] divided by its norm; zero stays zero."""
    norm = state.norm()
    return state / norm if norm > 0 else state
