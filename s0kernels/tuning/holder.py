"""A model with its learned states: activate, generate, save, load."""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from s0kernels.config import S0Config
from s0kernels.messages import some
from s0kernels.modules.families import DEFAULT_ALPHA
from s0kernels.modules.swap import find_site, layer_devices, swap_modules, swapped_site
from s0kernels.states import S0States, files
from s0kernels.tuning.data import check_names
from s0kernels.tuning.loop import EvalMode
from s0kernels.tuning.processes import processes
from s0kernels.tuning.tokens import encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Holder:
    """The part of `S0Trainer` that does not train: it holds a model with its states, and activates, saves and loads
    them."""

    def __init__(self, model: nn.Module, tokenizer: "PreTrainedTokenizerBase", config: S0Config | None = None):
        self.model = swap_modules(model)
        self.tokenizer = tokenizer
        if config is not None and not isinstance(config, S0Config):
            raise TypeError(f"S0Trainer: config must be an S0Config, got {type(config).__name__}")
        self.config = S0Config() if config is None else config
        site = find_site(self.model)
        assert site is not None  # the model has just been swapped
        self._arch = site.arch
        #: one dict per training step: step, loss (mean over examples), grad_norm (before clipping). With several tasks
        #: it has losses and grad_norms by task too, and loss is the mean of losses
        self.history: list[dict[str, Any]] = []
        self._states: S0States | None = None
        self._attached: S0States | None = None
        self._selection: str | list[str] | None = None
        self._training = False

    @property
    def device(self) -> torch.device:
        device = next(self.model.parameters()).device
        return next(iter(layer_devices(self.model).values())) if device.type == "meta" else device

    @property
    def states(self) -> S0States | None:
        """The trained or loaded states, unscaled; None before `train` or `load`."""
        return self._states

    @property
    def tasks(self) -> list[str] | None:
        """The names of the tasks, in the order of `states`; None if there is one task without a name."""
        return None if self._states is None else self._states.names

    @property
    def alpha(self) -> float:
        """The factor that `activate` multiplies the states by: that of the config, or the default of the
        architecture."""
        return DEFAULT_ALPHA[self._arch] if self.config.alpha is None else self.config.alpha

    @property
    def active(self) -> bool:
        """Whether sequences start from the states of this trainer. Another trainer may have attached its own to the
        same model."""
        site = find_site(self.model)
        attachment = None if site is None else site.attachment
        return attachment is not None and attachment.owner is self._attached

    def _refuse_while_training(self, method: str) -> None:
        if self._training:
            raise RuntimeError(f"S0Trainer.{method} cannot be called while training, from a callback or another thread")

    @property
    def pad_token_id(self) -> int:
        """The token to pad with. Its value does not matter, because pads are masked."""
        ids = (getattr(self.tokenizer, name, None) for name in ("pad_token_id", "eos_token_id"))
        return next((i for i in ids if i is not None), 0)

    # Using

    def activate(self, task: str | Sequence[str] | None = None) -> None:
        """Start every sequence from the trained states times `alpha`, until `deactivate`.

        `task` is the name of one of several tasks, or a list with one name for each row of later batches.
        """
        self._refuse_while_training("activate")
        selection = self._select(task, "activate")
        states = self._usable("activate")
        states.attach(self.model, self.alpha, selection)
        if self._attached is not None and self._attached is not states:
            self.deactivate()
        states.requires_grad_(False)  # inference needs no autograd graph
        self._attached, self._selection = states, selection

    def deactivate(self) -> None:
        """Start from zero states again."""
        if self._attached is not None:
            self._attached.detach()
            self._attached.requires_grad_(True)
            self._attached = None

    def _learned(self, method: str) -> S0States:
        if self._states is None:
            raise RuntimeError(f"S0Trainer.{method}: there are no states; call train() or load() first")
        return self._states

    def _usable(self, method: str) -> S0States:
        """Return the states to use, normalised if the config says so, but not scaled."""
        states = self._learned(method)
        if not self.config.normalize:
            return states
        norms = states.norms()
        units = {layer: states[layer].detach() / _or_one(norms[layer])[:, None, None, None] for layer in norms}
        return S0States(units, states.arch, states.base_model, states.names)

    def _select(self, task: str | Sequence[str] | None, method: str) -> str | list[str] | None:
        """Check `task` against the names of the tasks, and return it."""
        states = self._learned(method)
        if task is None:
            if states.tasks > 1:
                have = some(states.names or ())
                raise ValueError(f"S0Trainer.{method}: task must name one of {have}, or one for each row")
            return None
        names = [task] if isinstance(task, str) else task
        if not isinstance(names, (list, tuple)) or not names or not all(isinstance(name, str) for name in names):
            raise TypeError(f"S0Trainer.{method}: task must be a name or a list of names, got {task!r}")
        unknown = [name for name in names if name not in (states.names or ())]
        if unknown:
            have = "the one there is has no name" if states.names is None else f"they are {some(states.names)}"
            raise ValueError(f"S0Trainer.{method}: task: none is called {unknown[0]!r}; {have}")
        return task if isinstance(task, str) else list(names)

    def _reactivate(self, selection: str | list[str] | None) -> None:
        """Activate the new states, if they have the tasks that were active."""
        with contextlib.suppress(ValueError):
            self.activate(selection)

    def generate(
        self,
        prompt: str | list[str],
        max_new_tokens: int = 512,
        *,
        task: str | Sequence[str] | None = None,
        **kwargs: Any,
    ) -> str | list[str]:
        """Continue a prompt, or a list of prompts as one left-padded batch, and return the new text only.

        `task` names the task to start from, or one for each prompt, for this call alone. None uses the active states.
        `kwargs` are passed to `model.generate`. Several returned sequences per prompt come one after the other.
        """
        prompts = [prompt] if isinstance(prompt, str) else prompt
        if not isinstance(prompts, list) or not prompts or not all(isinstance(text, str) for text in prompts):
            raise TypeError(f"S0Trainer.generate: prompt must be a string or a list of them, got {prompt!r}")
        encoded = [encode(text, "S0Trainer.generate: prompt", self.tokenizer) for text in prompts]
        if not all(encoded):
            raise ValueError(f"S0Trainer.generate: prompt {prompts[encoded.index([])]!r} has no tokens")
        selection = None if task is None else self._select(task, "generate")
        if isinstance(selection, list) and len(selection) != len(prompts):
            raise ValueError(f"S0Trainer.generate: task names {len(selection)} tasks for {len(prompts)} prompts")
        pad = kwargs.pop("pad_token_id", None)
        pad = self.pad_token_id if pad is None else pad
        width = max(len(ids) for ids in encoded)
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in encoded], device="cpu")
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in encoded], device="cpu")
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            if selection is not None:
                stack.enter_context(self._usable("generate").attached(self.model, self.alpha, selection))
            model: Any = self.model
            out = model.generate(
                input_ids=ids.to(self.device),
                attention_mask=mask.to(self.device),
                max_new_tokens=max_new_tokens,
                pad_token_id=pad,
                **kwargs,
            )
        sequences = getattr(out, "sequences", out)
        texts = self.tokenizer.batch_decode(sequences[:, width:], skip_special_tokens=True)
        return texts[0] if isinstance(prompt, str) and len(texts) == 1 else texts

    @contextlib.contextmanager
    def _sampling_from(self, states: S0States | None, *where: Any) -> Iterator[None]:
        """Start from `states`, attached with the arguments `where`, in the calling context; from zero if `states` is
        None."""
        site = swapped_site(self.model, "S0Trainer")
        attached = site.override(None) if states is None else states.attached(self.model, *where)
        with EvalMode(self.model), attached:
            yield

    # Files

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write states and config to the directory `path`. Each of several tasks is written to a subdirectory with its
        name, and `tasks.json` lists the names. An earlier save there is replaced as a whole. See `S0States.save`. If
        there are several processes, the first one writes, and the others do not wait for it."""
        states = self._learned("save")
        if not processes().is_main_process:
            return
        folder = Path(path)
        names = states.names or [""]
        with ThreadPoolExecutor(min(len(names), 16)) as pool:  # threads mostly wait for the disk
            saved = [
                pool.submit(states.save, folder / name, task=task, config=self.config)
                for task, name in enumerate(names)
            ]
        errors = [error for each in saved if (error := each.exception()) is not None]
        if errors:  # the other tasks may have been written
            raise errors[0]
        files.write_tasks(folder, states.names)

    def load(self, path: str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]]) -> None:
        """Read states and config from a directory. If states were active, the new ones become active instead, provided
        that they have the active tasks.

        A directory with subdirectories of states is loaded as several tasks, with their names. A mapping from names to
        directories does the same. All tasks share one scale, so their configs must agree on alpha and normalize.
        """
        self._refuse_while_training("load")
        found = S0States.load_many(_folders(path), self.model)
        loaded = {name: states for name, (states, _) in found.items()}
        configs = {name: self.config if c is None else S0Config.from_dict(c) for name, (_, c) in found.items()}
        named = {name: states for name, states in loaded.items() if name is not None}
        states = S0States.stack(named) if named else loaded[None]
        first, config = next(iter(configs.items()))
        for name, other in configs.items():
            if (other.alpha, other.normalize) != (config.alpha, config.normalize):
                raise ValueError(
                    f"S0Trainer.load: task {first!r} is to be used with alpha {config.alpha} and normalize "
                    f"{config.normalize}, task {name!r} with {other.alpha} and {other.normalize}"
                )
        was_active, selection = self.active, self._selection
        self.deactivate()
        self._states, self.config = states, config
        if was_active:
            self._reactivate(selection)


def _folders(path: str | os.PathLike[str] | Mapping) -> dict[str | None, Path]:
    """Return the directories of states by task. The key of a single task without a name is None."""
    if isinstance(path, Mapping):
        if not path:
            raise ValueError("S0Trainer.load: path is empty")
        check_names(path)
        return {name: Path(folder) for name, folder in path.items()}
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"S0Trainer.load: path must be a path or a mapping from names to paths, got {path!r}")
    return files.find_tasks(Path(path))


def _or_one(norms: Tensor) -> Tensor:
    """Replace zero norms by one, so that a zero state stays zero when it is divided by its norm."""
    return norms.where(norms > 0, 1.0)
