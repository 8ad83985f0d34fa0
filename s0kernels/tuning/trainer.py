"""S0 tuning: learn the initial states of a frozen hybrid model from a few verified solutions."""

import contextlib
import math
import numbers
import operator
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from s0kernels.config import S0Config
from s0kernels.messages import some
from s0kernels.modules.families import DEFAULT_ALPHA
from s0kernels.modules.swap import find_site, layer_devices, swap_modules
from s0kernels.states import S0States, files
from s0kernels.tuning.batches import Batch, make_batches
from s0kernels.tuning.checkpoint import Checkpoint, describe_run
from s0kernels.tuning.data import Example, Examples, check_names, encode, read_tasks
from s0kernels.tuning.forwards import Asked
from s0kernels.tuning.loading import find_model, load_tokenizer
from s0kernels.tuning.loop import Callback, EvalMode, Frozen, Learner
from s0kernels.tuning.memory import Make, Sizes, for_each, halved, most_tokens
from s0kernels.tuning.processes import processes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class S0Trainer:
    """Trains the initial states of a model, and uses them. The API of the `s0-tuning` package.

    Args:
        model: a causal language model of transformers, of a supported family. Its mixers are swapped in place.
        tokenizer: its tokenizer.
        config: settings; the defaults are those of the method.

    The base weights get no gradient and do not change. Started in several processes (`accelerate launch`, `torchrun`),
    each trains on a share of the batches and all end with the same states.
    """

    def __init__(self, model: nn.Module, tokenizer: "PreTrainedTokenizerBase", config: S0Config | None = None):
        self.model = swap_modules(model)
        self.tokenizer = tokenizer
        if config is not None and not isinstance(config, S0Config):
            raise TypeError(f"S0Trainer: config must be an S0Config, got {type(config).__name__}")
        self.config = S0Config() if config is None else config
        site = find_site(self.model)
        assert site is not None  # it has just been swapped
        self._arch = site.arch
        #: one dict per training step: step, loss (mean over examples), grad_norm (before clipping); with several
        #: tasks also losses and grad_norms by task, of which loss is the mean
        self.history: list[dict[str, Any]] = []
        self._states: S0States | None = None
        self._attached: S0States | None = None
        self._selection: str | list[str] | None = None
        self._training = False

    @classmethod
    def from_pretrained(cls, model_name: str, config: S0Config | None = None, **model_kwargs: Any) -> "S0Trainer":
        """Load model and tokenizer through transformers' Auto classes.

        `model_kwargs` go to `AutoModelForCausalLM.from_pretrained`. Unless they say otherwise the model is bf16 spread
        by `device_map="auto"` where there is a GPU, and fp32 on the CPU where there is none. A name that does not exist
        or that cannot be looked up, and a model of another family, are refused before weights are loaded.
        """
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model_kwargs |= find_model(model_name, model_kwargs)
        gpu = torch.cuda.is_available()
        if "torch_dtype" not in model_kwargs:
            model_kwargs.setdefault("dtype", torch.bfloat16 if gpu else torch.float32)
        if gpu:
            alone = processes().num_processes == 1
            model_kwargs.setdefault("device_map", "auto" if alone else {"": processes().local_process_index})
        tokenizer = load_tokenizer(AutoTokenizer, model_name, model_kwargs)
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
    def tasks(self) -> list[str] | None:
        """Names of the tasks, in the order in which `states` holds them; None where there is one without a name."""
        return None if self._states is None else self._states.names

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
        self,
        data: Examples | Mapping[str, Examples],
        *,
        tokens_per_batch: int | None = None,
        max_memory: int | None = None,
        packed: bool | None = None,
        callbacks: Sequence[Callback] = (),
        checkpoint: str | os.PathLike[str] | None = None,
        checkpoint_every: int = 1,
        progress: bool = True,
        scale: float = 1.0,
        layers: Sequence[int] | None = None,
    ) -> dict[str, float]:
        """Learn S0 from zero.

        Args:
            data: pairs (text, prompt_length), the second being the number of first tokens that are the prompt, which
                is not learned; or mappings with prompt and completion, or with the messages of a conversation; or a
                file of JSON lines; see `s0kernels.tuning.data.read_examples`. A mapping from names to such data trains
                several tasks at once, each as if it were alone.
            tokens_per_batch: examples go through the model together up to this many tokens per forward, pads included;
                1 is one example a forward. The result does not depend on it but for rounding: each step's loss is the
                mean over all examples of each example's mean cross-entropy per completion token. None: the longest
                example is tried, and the largest power of two is taken that keeps to `max_memory`, and on a CPU the
                smallest that gives the model enough to do at a time. Where a forward runs out of memory all the same,
                it is done again with half, and so are those to come. The history says what was chosen, and a
                checkpoint keeps to it.
            max_memory: bytes that each process may take beyond the model, of a GPU's memory or of resident memory.
                Where one example needs more, layers are recomputed in the backward instead of being kept. None:
                nine tenths of what is free on a GPU, half of it on a CPU, shared by the processes there. With
                `tokens_per_batch` as well, that is halved until it fits.
            packed: lay the examples of a batch end to end instead of padding them. None: where the model has flash
                attention.
            callbacks: each is called after every step with the step's entry of `history`, to which it may add, and
                the states, which are attached at `scale` so that `evaluate` sees them; `save` saves them. True ends
                the training. In several processes each calls them.
            checkpoint: a file to save the run to after every `checkpoint_every` steps. Where it exists the run goes on
                from there, with the bits it would have had without the interruption (on the same number of processes);
                a longer `n_steps` prolongs a run, unless a callback has ended it.
            progress: say what is to be expected, in tokens, memory and time, and show a progress bar.
            scale: what the states are multiplied by while they learn. 1 learns them raw, as the `s0-tuning` package
                does, and only their use is scaled; `trainer.alpha` is Algorithm 1 of the method's paper, in which
                training sees what use will see, and a state has to grow further for the same effect.
            layers: the recurrent layers whose states learn; the others stay zero. None: all of them.

        Where states are active, the new ones take their place if they have the tasks that are active.

        Returns:
            `final_loss`, the loss of the last step before its update, and `avg_state_norm`, the mean norm of the
            state of a layer that learns. The losses of all steps are in `history`.

        Raises:
            TypeError, ValueError: no data, or an example with nothing to predict (named by its index); `checkpoint` is
                of another run; `scale` is zero; `layers` names a layer that has no state; `max_memory` is less than one
                example takes.
            torch.OutOfMemoryError: one example takes more than there is, with layers checkpointed.
            RuntimeError: a perturbed S0 leaves the logits as they are, or the loss or its gradient is not finite.
        """
        self._refuse_while_training("train")
        callbacks = _check_callbacks(callbacks)
        every = _check_positive("checkpoint_every", checkpoint_every)
        scale = _check_scale(scale)
        asked = Asked(_check_size("tokens_per_batch", tokens_per_batch), _check_size("max_memory", max_memory))
        tasks, examples = read_tasks(data, self.tokenizer, self.config.max_length)
        with torch.inference_mode(False), torch.enable_grad():
            make = self._make(packed, at_least=processes().num_processes)
            states = S0States.for_model(self.model, tasks or 1)
            learning = _check_layers(layers, states)
            for layer in states:
                states[layer].requires_grad_(layer in learning)
            run = describe_run(examples, tasks, self.config, states, scale)
            file = None if checkpoint is None else Checkpoint(checkpoint, run)
            with Frozen(self.model):
                learner = Learner(self.model, self.config, states, examples, make, scale)
                history, ended = learner.resume(file, asked)
                learner.compare(run, every, history, asked)
                with self._in_training(states, history):
                    if not history:
                        learner.check_effect()
                    if ended or len(history) == self.config.n_steps > 0:
                        final_loss = learner.show(history, progress)
                    else:
                        final_loss = learner.learn(history, asked, callbacks, file, every, progress)
        norms = torch.stack([norm.cpu() for layer, norm in states.norms().items() if layer in learning])
        return {"final_loss": final_loss, "avg_state_norm": float(norms.mean())}

    @contextlib.contextmanager
    def _in_training(self, states: S0States, history: list[dict[str, Any]]) -> Iterator[None]:
        """`states` and `history` are the trainer's from here on, unless training them fails."""
        before = self._states, self.history
        was_active, selection = self.active, self._selection
        self.deactivate()
        self._states, self.history, self._training = states, history, True
        try:
            yield
        except BaseException:
            self._states, self.history = before
            raise
        finally:
            self._training = False
            states.requires_grad_(True)
            if was_active:
                self._reactivate(selection)

    def _refuse_while_training(self, method: str) -> None:
        if self._training:
            raise RuntimeError(f"S0Trainer.{method} cannot be called while training, from a callback or another thread")

    def evaluate(
        self,
        data: Examples | Mapping[str, Examples],
        *,
        tokens_per_batch: int | None = None,
        packed: bool | None = None,
    ) -> float | dict[str, float]:
        """The loss of `train` (without the L2 term) on `data`, with the states as they are active now.

        A mapping from names to data gives a loss for each; where states with names are attached, each is from its own.
        In several processes each evaluates all of it. `tokens_per_batch=None`: as many as a forward gets faster with.
        A forward that runs out of memory is done again with half.
        """
        tokens = _check_size("tokens_per_batch", tokens_per_batch) or most_tokens(self.model, self.device)
        make = self._make(packed)
        tasks, examples = read_tasks(data, self.tokenizer, self.config.max_length)
        site = find_site(self.model)
        current = None if site is None else site.current()
        states, scale = (current.owner, current.scale) if current is not None else (None, 1.0)
        states = states if isinstance(states, S0States) else None
        named = states if states is not None and states.names is not None and tasks is not None else None
        several = current is not None and isinstance(current.tasks, Tensor)
        several = several or (self._training and states is not None and states.tasks > 1)
        if several and named is None:
            raise ValueError("S0Trainer.evaluate: data must be a mapping from names where several tasks are in use")
        sizes, head = Sizes(tokens), None
        losses = torch.zeros(len(tasks or [None]), dtype=torch.float64)

        def add(batch: Batch) -> None:
            nonlocal head
            names = [tasks[task] for task in batch.tasks] if tasks else None
            with contextlib.nullcontext() if named is None else named.attached(self.model, scale, names):
                head = batch.head(self.model) if head is None else head
                losses.add_(batch.losses(self.model, len(losses), head).cpu())

        def less(batch: Batch) -> Callable[[list[Example]], list[Batch]] | None:
            nonlocal sizes
            found = halved(sizes, batch, make, False)
            sizes = found or sizes
            return None if found is None else lambda examples: make(examples, found.tokens)

        with EvalMode(self.model), torch.no_grad():
            for_each(make(examples, tokens), add, less)
        losses /= torch.bincount(torch.tensor([example.task for example in examples]))
        return float(losses[0]) if tasks is None else dict(zip(tasks, losses.tolist(), strict=True))

    def _make(self, packed: bool | None, at_least: int = 1) -> Make:
        """What makes batches within a budget of tokens; within a smaller one where there would be fewer than
        `at_least`, a batch for every process."""
        pad, device = self.pad_token_id, self.device

        def make(examples: Sequence[Example], tokens: int) -> list[Batch]:
            while True:
                batches = make_batches(examples, tokens, packed, self.model, pad, device)
                if len(batches) >= min(at_least, len(examples)):
                    return batches
                tokens = min(tokens, sum(len(example.ids) for example in examples)) // 2

        return make

    @property
    def pad_token_id(self) -> int:
        """What stands at pads, which nothing reads."""
        ids = (getattr(self.tokenizer, name, None) for name in ("pad_token_id", "eos_token_id"))
        return next((i for i in ids if i is not None), 0)

    # Using

    def activate(self, task: str | Sequence[str] | None = None) -> None:
        """Start every sequence from the trained states times `alpha`, until `deactivate`.

        `task` names one of several tasks, or one for each row of the batches to come.
        """
        self._refuse_while_training("activate")
        selection = self._select(task, "activate")
        states = self._usable("activate")
        states.attach(self.model, self.alpha, selection)
        if self._attached is not None and self._attached is not states:
            self.deactivate()
        states.requires_grad_(False)  # using the states builds no graph
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
        """The states as they are to be used, but for the scale."""
        states = self._learned(method)
        if not self.config.normalize:
            return states
        norms = states.norms()
        units = {layer: states[layer].detach() / _or_one(norms[layer])[:, None, None, None] for layer in norms}
        return S0States(units, states.arch, states.base_model, states.names)

    def _select(self, task: str | Sequence[str] | None, method: str) -> str | list[str] | None:
        """`task`, checked against the states that there are."""
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
        """Go on with other states, if they have the tasks that were active."""
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
        """Continue a prompt, or a list of prompts as one left-padded batch; the new text only.

        `task` names the task to start from, or one for each prompt, for this call alone; None: what is active.
        `kwargs` go to `model.generate`. Several returned sequences per prompt come one after the other.
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

    # Files

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write states and config to the directory `path`; of several tasks each to a directory in it that has its
        name, with their names in `tasks.json`. What was there before gives way as a whole. See `S0States.save`. Of
        several processes the first writes, and the others do not wait for it."""
        states = self._learned("save")
        if not processes().is_main_process:
            return
        folder = Path(path)
        names = states.names or [""]
        with ThreadPoolExecutor(min(len(names), 16)) as pool:  # they wait for the disk most of the time
            saved = [
                pool.submit(states.save, folder / name, task=task, config=self.config)
                for task, name in enumerate(names)
            ]
        errors = [error for each in saved if (error := each.exception()) is not None]
        if errors:  # the other tasks may have had more luck
            raise errors[0]
        files.write_tasks(folder, states.names)

    def load(self, path: str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]]) -> None:
        """Read states and config from a directory. Where states are active, the new ones take their place if they have
        the tasks that are active.

        A directory that holds directories of states gives several tasks, with their names; a mapping from names to
        directories names them. They are used at one scale, so their configs have to agree on it.
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
    """Directories of states by task; None is the name of a single one."""
    if isinstance(path, Mapping):
        if not path:
            raise ValueError("S0Trainer.load: path is empty")
        check_names(path)
        return {name: Path(folder) for name, folder in path.items()}
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"S0Trainer.load: path must be a path or a mapping from names to paths, got {path!r}")
    return files.find_tasks(Path(path))


def _check_positive(name: str, value: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = 0
    if isinstance(value, bool) or number < 1:
        raise ValueError(f"S0Trainer: {name} must be a positive int, got {value!r}")
    return number


def _check_size(name: str, value: int | None) -> int | None:
    return None if value is None else _check_positive(name, value)


def _check_scale(scale: float) -> float:
    if isinstance(scale, bool) or not isinstance(scale, numbers.Real) or not math.isfinite(scale) or scale == 0:
        raise ValueError(f"S0Trainer: scale must be a finite number other than 0, got {scale!r}")
    return float(scale)


def _check_layers(layers: Sequence[int] | None, states: S0States) -> list[int]:
    if layers is None:
        return list(states)
    if isinstance(layers, (str, bytes)) or not isinstance(layers, Sequence) or not layers:
        raise TypeError(f"S0Trainer: layers must be a list of layer numbers, or None for all, got {layers!r}")
    unknown = [layer for layer in layers if isinstance(layer, bool) or layer not in list(states)]
    if unknown:
        raise ValueError(f"S0Trainer: layers: {unknown[0]!r} has no state; the layers that do are {list(states)}")
    return sorted(set(layers))


def _check_callbacks(callbacks: Sequence[Callback]) -> list[Callback]:
    if not isinstance(callbacks, (list, tuple)) or not all(callable(callback) for callback in callbacks):
        raise TypeError(f"S0Trainer: callbacks must be a list of functions, got {callbacks!r}")
    return list(callbacks)


def _or_one(norms: Tensor) -> Tensor:
    """A state that is zero stays so."""
    return norms.where(norms > 0, 1.0)
