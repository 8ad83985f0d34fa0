"""S0 tuning: learn the initial states of a frozen hybrid model from a few verified solutions."""

import contextlib
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from s0kernels._files import STATES, read_directory
from s0kernels.batches import Batch, make_batches
from s0kernels.checkpoint import Checkpoint, describe_run
from s0kernels.config import S0Config
from s0kernels.data import Example, check_names, read_tasks
from s0kernels.learner import Callback, Frozen, Learner, processes
from s0kernels.modules.families import DEFAULT_ALPHA
from s0kernels.modules.swap import find_site, layer_devices, swap_modules
from s0kernels.states import S0States


class S0Trainer:
    """Trains the initial states of a model, and uses them. The API of the `s0-tuning` package.

    Args:
        model: a causal language model of transformers, of a supported family. Its mixers are swapped in place.
        tokenizer: its tokenizer.
        config: settings; the defaults are those of the method.

    The base weights get no gradient and do not change. Started in several processes (`accelerate launch`, `torchrun`),
    each trains on a share of the batches and all end with the same states.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, config: S0Config | None = None):
        self.model = swap_modules(model)
        self.tokenizer = tokenizer
        if config is not None and not isinstance(config, S0Config):
            raise TypeError(f"S0Trainer: config must be an S0Config, got {type(config).__name__}")
        self.config = S0Config() if config is None else config
        self._arch = find_site(self.model).arch
        #: one dict per training step: step, loss (mean over examples), grad_norm (before clipping); with several
        #: tasks also losses and grad_norms by task, of which loss is the mean
        self.history: list[dict[str, Any]] = []
        self._states: S0States | None = None
        self._attached: S0States | None = None
        self._selection: str | Sequence[str] | None = None

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
            alone = processes().num_processes == 1
            model_kwargs.setdefault("device_map", "auto" if alone else {"": processes().local_process_index})
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
        data: Any,
        *,
        tokens_per_batch: int = 4096,
        packed: bool | None = None,
        callbacks: Sequence[Callback] = (),
        checkpoint: str | os.PathLike | None = None,
        checkpoint_every: int = 1,
        progress: bool = True,
    ) -> dict[str, float]:
        """Learn S0 from zero.

        Args:
            data: pairs (text, prompt_length), the second being the number of first tokens that are the prompt, which
                is not learned; or mappings with prompt and completion, or with the messages of a conversation; or a
                file of JSON lines; see `s0kernels.data.read_examples`. A mapping from names to such data trains
                several tasks at once, each as if it were alone.
            tokens_per_batch: examples go through the model together up to this many tokens per forward. The result
                does not depend on it but for rounding: each step's loss is the mean over all examples of each
                example's mean cross-entropy per completion token.
            packed: lay the examples of a batch end to end instead of padding them. None: where the model has flash
                attention.
            callbacks: each is called after every step with the step's entry of `history`, to which it may add, and
                the states, which are attached at scale 1 so that `evaluate` sees them. True ends the training.
            checkpoint: a file to save the run to after every `checkpoint_every` steps. Where it exists the run goes on
                from there, with the bits it would have had without the interruption; a longer `n_steps` prolongs it.
            progress: show a progress bar.

        Returns:
            `final_loss`, the loss of the last step before its update, and `avg_state_norm`, the mean norm of a
            layer's state. The losses of all steps are in `history`.

        Raises:
            ValueError: no data, or an example with nothing to predict (named by its index); `checkpoint` is of another
                run.
            RuntimeError: a perturbed S0 leaves the logits as they are, or the loss is not finite.
        """
        tasks, examples = read_tasks(data, self.tokenizer, self.config.max_length)
        _check_positive("checkpoint_every", checkpoint_every)
        _check_positive("tokens_per_batch", tokens_per_batch)
        share = math.ceil(sum(len(example.ids) for example in examples) / processes().num_processes)
        batches = self._batches(examples, min(tokens_per_batch, share), packed)  # no process is to be without one
        states = S0States.for_model(self.model, tasks or 1)
        run = describe_run(examples, tasks, self.config, states)
        file = None if checkpoint is None else Checkpoint(Path(checkpoint), run)
        was_active, selection = self.active, self._selection
        self.deactivate()
        try:
            with Frozen(self.model), torch.enable_grad():
                learner = Learner(self.model, self.config, states, batches, run)
                history = learner.learn(examples[0], callbacks, file, checkpoint_every, progress)
                final_loss = history[-1]["loss"] if history else float(learner.losses(batches).mean())
            self._states, self.history = states, history
        finally:
            if was_active and self._can_start_from(selection):
                self.activate(selection)
        norms = torch.stack([norm.cpu() for norm in states.norms().values()])
        return {"final_loss": final_loss, "avg_state_norm": float(norms.mean())}

    def evaluate(
        self, data: Any, *, tokens_per_batch: int = 4096, packed: bool | None = None
    ) -> float | dict[str, float]:
        """The loss of `train` (without the L2 term) on `data`, with the states as they are active now.

        A mapping from names to data gives a loss for each; where states with names are attached, each is from its own.
        """
        tasks, examples = read_tasks(data, self.tokenizer, self.config.max_length)
        current, losses = find_site(self.model).current(), []
        named = tasks is not None and current is not None and current.owner.names is not None
        with Frozen(self.model), torch.no_grad():
            for number, name in enumerate(tasks or [None]):
                chosen = [example._replace(task=0) for example in examples if example.task == number]
                batches = self._batches(chosen, tokens_per_batch, packed)
                with current.owner.attached(self.model, current.scale, name) if named else contextlib.nullcontext():
                    losses.append(sum(float(batch.losses(self.model)) for batch in batches) / len(chosen))
        return losses[0] if tasks is None else dict(zip(tasks, losses, strict=True))

    def _batches(self, examples: Sequence[Example], tokens_per_batch: int, packed: bool | None) -> list[Batch]:
        _check_positive("tokens_per_batch", tokens_per_batch)
        pad = next((i for i in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id) if i is not None), 0)
        return make_batches(examples, tokens_per_batch, packed, self.model, pad, self.device)

    # Using

    def activate(self, task: str | Sequence[str] | None = None) -> None:
        """Start every sequence from the trained states times `alpha`, until `deactivate`.

        `task` names one of several tasks, or one for each row of the batches to come.
        """
        if self._states is None:
            raise RuntimeError("S0Trainer.activate: there are no states; call train() or load() first")
        if task is None and self._states.tasks > 1:
            raise ValueError(f"S0Trainer.activate: task must name one of {self.tasks}, or one for each row")
        states = self._usable()
        states.attach(self.model, self.alpha, task)  # raises before anything has changed
        if self._attached is not None and self._attached is not states:
            self.deactivate()
        states.requires_grad_(False)  # using the states builds no graph
        self._attached, self._selection = states, task

    def deactivate(self) -> None:
        """Start from zero states again."""
        if self._attached is not None:
            self._attached.detach()
            self._attached.requires_grad_(True)
            self._attached = None

    def _usable(self) -> S0States:
        """The states as they are to be used, but for the scale."""
        if not self.config.normalize:
            return self._states
        norms = self._states.norms()
        units = {layer: self._states[layer].detach() / _or_one(norms[layer])[:, None, None, None] for layer in norms}
        return S0States(units, self._states.arch, self._states.base_model, self._states.names)

    def _can_start_from(self, task: str | Sequence[str] | None) -> bool:
        if self._states is None or task is None:
            return self._states is not None and self._states.tasks == 1
        return ({task} if isinstance(task, str) else set(task)) <= set(self.tasks or ())

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
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            if task is not None:
                if self._states is None:
                    raise RuntimeError("S0Trainer.generate: there are no states; call train() or load() first")
                stack.enter_context(self._usable().attached(self.model, self.alpha, task))
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
        """Write states and config to the directory `path`; of several tasks each to a directory in it that has its
        name. See `S0States.save`. Of several processes the first writes."""
        if self._states is None:
            raise RuntimeError("S0Trainer.save: there are no states; call train() or load() first")
        if processes().is_main_process:
            for task, name in enumerate(self.tasks or [""]):
                self._states.save(Path(path) / name, task=task, config=self.config)
        processes().wait_for_everyone()

    def load(self, path: str | os.PathLike | Mapping[str, str | os.PathLike]) -> None:
        """Read states and config from a directory. Where states are active, the new ones take their place.

        A directory that holds directories of states gives several tasks, with their names; a mapping from names to
        directories names them. They are used at one scale, so their configs have to agree on it.
        """
        folders = _folders(path)
        loaded = {name: S0States.load(folder, self.model) for name, folder in folders.items()}
        states = loaded[None] if None in loaded else S0States.stack(loaded)
        configs = {}
        for name, folder in folders.items():
            *_, config = read_directory(folder, self._arch)
            configs[name] = self.config if config is None else S0Config.from_dict(config)
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
        if was_active and self._can_start_from(selection):
            self.activate(selection)


def _folders(path: str | os.PathLike | Mapping) -> dict[str | None, Path]:
    """Directories of states by task; None is the name of a single one."""
    if isinstance(path, Mapping):
        if not path:
            raise ValueError("S0Trainer.load: path is empty")
        check_names(path)
        return {name: Path(folder) for name, folder in path.items()}
    folder = Path(path)
    inner = sorted(file.parent for file in folder.glob(f"*/{STATES}"))
    if (folder / STATES).exists() or not inner:
        return {None: folder}
    return {each.name: each for each in inner}


def _check_positive(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"S0Trainer: {name} must be a positive int, got {value!r}")


def _or_one(norms: Tensor) -> Tensor:
    """A state that is zero stays so."""
    return norms.where(norms > 0, 1.0)
