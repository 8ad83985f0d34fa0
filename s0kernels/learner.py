"""The loop of S0 training: batches through a frozen model, gradients of S0 from all processes, Adam."""

import atexit
import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from s0kernels.batches import Batch, make_batches
from s0kernels.checkpoint import Checkpoint
from s0kernels.config import S0Config
from s0kernels.data import Example
from s0kernels.states import S0States

#: called after every step with its entry of the history and the states as they are then; True ends the training
Callback = Callable[[dict, S0States], "bool | None"]


class Learner:
    """The states that learn, the batches they learn from, and this process's share of them. States that do not
    require grad stay as they are; `scale` is what all are attached at."""

    def __init__(self, model: nn.Module, config: S0Config, states: S0States, batches: Sequence[Batch], scale: float):
        self._model, self._config, self._states, self._batches = model, config, states, batches
        self._scale = scale
        owners = torch.tensor([task for batch in batches for task in batch.tasks])
        self._counts = torch.bincount(owners, minlength=states.tasks).double()
        self._processes = processes()
        self._head = batches[0].head(model)
        self._parameters = [parameter for parameter in states.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.Adam(self._parameters, lr=config.lr)

    def resume(self, file: Checkpoint | None) -> tuple[list[dict[str, Any]], bool]:
        """The history so far, with the states as they were then, and whether a callback has ended it."""
        history, ended = ([], False) if file is None else file.read(self._states, self._optimizer)
        if len(history) > self._config.n_steps:
            raise ValueError(
                f"S0Trainer.train: the checkpoint holds {len(history)} steps, and n_steps is {self._config.n_steps}"
            )
        return history, ended

    def compare(self, *settings: Any) -> None:
        """Refuse to go on unless all processes are about to do the same."""
        if self._processes.num_processes == 1:
            return
        from accelerate.utils import gather_object

        mine = (self._config, [[len(example.ids) for example in batch.examples] for batch in self._batches], settings)
        if any(other != mine for other in gather_object([mine])):
            raise ValueError(
                "S0Trainer.train: the processes were not given the same data, settings, model and checkpoint"
            )

    def learn(
        self,
        history: list[dict[str, Any]],
        callbacks: Sequence[Callback],
        file: Checkpoint | None,
        every: int,
        bar: tqdm,
    ) -> None:
        """Steps up to `n_steps`, or until a callback ends them, added to `history`."""
        ended = False
        while len(history) < self._config.n_steps and not ended:
            entry = self._step(len(history))
            history.append(entry)
            with self._states.attached(self._model, self._scale):
                answers = [callback(entry, self._states) for callback in callbacks]
            ended = any(isinstance(answer, (bool, numpy.bool_)) and bool(answer) for answer in answers)
            ended = bool(self._sum(torch.tensor(float(ended))) > 0)
            due = ended or len(history) % every == 0 or len(history) == self._config.n_steps
            if file is not None and due and self._processes.is_main_process:
                file.write(self._states, self._optimizer, history, ended)
            bar.set_postfix(loss=f"{entry['loss']:.4f}", refresh=False)
            bar.update()

    def _step(self, number: int) -> dict[str, Any]:
        config, parameters = self._config, self._parameters
        share = self._batches[self._processes.process_index :: self._processes.num_processes]
        # summed in fp64, the result does not depend on the order, and so not on which process has which batch
        sums = [torch.zeros_like(parameter, dtype=torch.float64) for parameter in parameters]
        losses = torch.zeros_like(self._counts)
        for batch in share:
            with _checkpointed_layers(self._model):
                found = self._losses(batch)
                (found / self._counts.to(found)).sum().backward()
            losses += found.detach().cpu()
            for total, parameter in zip(sums, parameters, strict=True):
                total += parameter.grad
                parameter.grad = None
        losses = self._sum(losses) / self._counts
        if not losses.isfinite().all():
            raise RuntimeError(f"S0Trainer.train: the loss is {float(losses.mean())} at step {number}")
        for total, parameter in zip(sums, parameters, strict=True):
            parameter.grad = (self._sum(total) + 2 * config.l2_lambda * parameter.detach()).float()
        norms = self._clip(parameters)
        if not norms.isfinite().all():
            raise RuntimeError(f"S0Trainer.train: the gradient is not finite at step {number}")
        self._optimizer.step()
        self._optimizer.zero_grad()
        entry = {"step": number, "loss": float(losses.mean()), "grad_norm": float(norms.norm())}
        if self._states.names is not None:
            for key, values in (("losses", losses), ("grad_norms", norms)):
                entry[key] = dict(zip(self._states.names, values.tolist(), strict=True))
        return entry

    @torch.no_grad()
    def loss(self) -> float:
        """The mean over tasks of the mean over their examples, with the states as they are."""
        return float((sum(self._losses(batch).cpu().double() for batch in self._batches) / self._counts).mean())

    def _losses(self, batch: Batch) -> Tensor:
        several = self._states.tasks > 1
        with self._states.attached(self._model, self._scale, batch.tasks if several else 0):
            return batch.losses(self._model, self._states.tasks, self._head)

    def _clip(self, parameters: Sequence[nn.Parameter]) -> Tensor:
        """Scale each task's gradient down to the norm allowed; the norms before that, [tasks]."""
        squares = sum(parameter.grad.double().flatten(1).square().sum(1).cpu() for parameter in parameters)
        factors = (self._config.grad_clip / (squares.sqrt() + 1e-6)).clamp(max=1.0)
        for parameter in parameters:
            parameter.grad *= factors.to(parameter.grad)[:, None, None, None]
        return squares.sqrt()

    def _sum(self, value: Tensor) -> Tensor:
        """Over all processes."""
        if self._processes.num_processes == 1:
            return value
        from accelerate.utils import reduce

        return reduce(value.to(self._processes.device), reduction="sum").to(value.device)

    @torch.no_grad()
    def check_effect(self, example: Example) -> None:
        """Refuse to train where S0 does not reach the logits: a run without effect would end without an error."""
        batch = make_batches([example], 1, False, self._model, 0, self._batches[0].device)[0]
        with self._states.attached(self._model, self._scale):
            before = batch.hidden(self._head)
            generator = torch.Generator().manual_seed(0)
            for state in self._parameters:
                state.copy_(torch.randn(state.shape[1:], generator=generator).expand(state.shape))
            after = batch.hidden(self._head)
        for state in self._parameters:
            state.zero_()
        if torch.equal(before, after):
            raise RuntimeError(
                "S0Trainer.train: a random initial state leaves the logits unchanged, so there is nothing to learn. "
                "Either the mixers were replaced after swap_modules, or the model forgets its state at once "
                "(decays near zero)."
            )


class EvalMode:
    """Everything in evaluation mode; afterwards it is as it was."""

    def __init__(self, model: nn.Module):
        self.model = model

    def __enter__(self) -> None:
        self._training = {module: module.training for module in self.model.modules()}
        self.model.eval()

    def __exit__(self, *_) -> None:
        for module, training in self._training.items():
            module.training = training


class Frozen(EvalMode):
    """Weights without gradients besides, by name: accelerate replaces the parameters it brings and takes away."""

    def __enter__(self) -> None:
        super().__enter__()
        self._trainable = {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        self.model.requires_grad_(False)

    def __exit__(self, *_) -> None:
        super().__exit__()
        for name, parameter in self.model.named_parameters():
            if name in self._trainable:
                parameter.requires_grad_(True)


@contextlib.contextmanager
def _checkpointed_layers(model: nn.Module) -> Iterator[None]:
    """transformers checkpoints layers in training mode only; what is inside them stays in evaluation mode."""
    layers = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    for layer in layers:
        layer.training = True
    try:
        yield
    finally:
        for layer in layers:
            layer.training = False


def processes():
    """The processes that train together; one, unless started by `accelerate launch` or the like."""
    from accelerate import PartialState

    distributed = torch.distributed
    theirs = distributed.is_available() and distributed.is_initialized()
    state = PartialState(cpu=not torch.accelerator.is_available())
    if not theirs and distributed.is_available() and distributed.is_initialized():
        atexit.register(_end_process_group, os.getpid())
    return state


def _end_process_group(process: int) -> None:
    """The group that `processes` has made, in the process that made it. A thread of gloo's that still held a tensor
    while Python shuts down would abort the process."""
    if os.getpid() == process and torch.distributed.is_initialized() and torch.distributed.get_backend() == "gloo":
        torch.distributed.destroy_process_group()
