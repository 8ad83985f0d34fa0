"""The loop of S0 training: run batches through the frozen model, sum the gradients of S0 over all processes, step
Adam."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from s0kernels.config import S0Config
from s0kernels.progress import Progress, say
from s0kernels.states import S0States
from s0kernels.tuning.batches import Batch
from s0kernels.tuning.checkpoint import Checkpoint
from s0kernels.tuning.data import Example
from s0kernels.tuning.forwards import Asked, Forwards
from s0kernels.tuning.memory import Make, Sizes
from s0kernels.tuning.processes import Processes
from s0kernels.tuning.processes import processes as processes

#: called after every step with its entry of the history and the current states; True ends the training
Callback = Callable[[dict, S0States], "bool | None"]


class Learner:
    """Trains states on examples. States that do not require grad stay unchanged. All states are attached at `scale`.
    `make` puts examples into batches."""

    def __init__(
        self,
        model: nn.Module,
        config: S0Config,
        states: S0States,
        examples: Sequence[Example],
        make: Make,
        scale: float,
    ):
        self._model, self._config, self._states, self._scale = model, config, states, scale
        owners = torch.tensor([example.task for example in examples], device="cpu")
        self._counts = torch.bincount(owners, minlength=states.tasks).double()
        self._processes = Processes()
        self._forwards = Forwards(model, states, examples, make, scale)
        #: the sizes of forwards in the run that is resumed
        self._resumed: Sizes | None = None
        self._parameters = [parameter for parameter in states.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.Adam(self._parameters, lr=config.lr)

    def resume(self, file: Checkpoint | None, asked: Asked) -> tuple[list[dict[str, Any]], bool]:
        """Restore the states from a checkpoint. Return the history so far, and whether a callback has ended the run.
        Forwards keep their size if the user `asked` for it in the same way."""
        history, ended, sizes = ([], False, None) if file is None else file.read(self._states, self._optimizer)
        if len(history) > self._config.n_steps:
            raise ValueError(
                f"S0Trainer.train: the checkpoint holds {len(history)} steps, and n_steps is {self._config.n_steps}"
            )
        if history and sizes is not None and sizes["asked"] == list(asked):
            self._resumed = Sizes(sizes["tokens"], sizes["checkpointed"])
        return history, ended

    def compare(self, *settings: Any) -> None:
        """Raise ValueError unless all processes have the same settings."""
        if not self._processes.alike((self._config, self._forwards.lengths, settings)):
            raise ValueError(
                "S0Trainer.train: the processes were not given the same data, settings, model and checkpoint"
            )

    def learn(
        self,
        history: list[dict[str, Any]],
        asked: Asked,
        callbacks: Sequence[Callback],
        file: Checkpoint | None,
        every: int,
        progress: bool,
    ) -> float:
        """Train up to `n_steps` steps, or until a callback ends the run, and add each step to `history`. Return the
        loss of the last step; if there was no step, the loss of the current states."""
        steps = self._config.n_steps
        tell = say if progress and self._processes.is_main else None
        with (
            self._forwards.cut(asked, self._resumed, tell, steps - len(history)) as note,
            self._bar(history, tell is not None) as bar,
        ):
            if steps == 0:
                return self._loss()
            ended = False
            while len(history) < steps and not ended:
                entry = self.step(len(history))
                history.append({**entry, **{name: value for name, value in note.items() if name not in entry}})
                note = {}
                with self._states.attached(self._model, self._scale):
                    answers = [callback(history[-1], self._states) for callback in callbacks]
                ended = any(isinstance(answer, (bool, numpy.bool_)) and bool(answer) for answer in answers)
                ended = self._processes.any(ended)
                due = ended or len(history) % every == 0 or len(history) == steps
                if file is not None and due and self._processes.is_main:
                    sizes = {"asked": list(asked), **self._forwards.sizes._asdict()}
                    file.write(self._states, self._optimizer, history, ended, sizes)
                bar.reach(len(history), f"loss {history[-1]['loss']:.4f}")
        return history[-1]["loss"]

    def show(self, history: Sequence[Mapping], progress: bool) -> float:
        """Show the bar of a run that is already complete, and return its last loss."""
        self._bar(history, progress and self._processes.is_main).close()
        return history[-1]["loss"]

    def _bar(self, history: Sequence[Mapping], shown: bool) -> Progress:
        return Progress("S0 tuning", self._config.n_steps, "step", len(history), shown)

    def step(self, number: int) -> dict[str, Any]:
        """Do one step of the optimizer, and return its entry of the history."""
        config, parameters = self._config, self._parameters
        # sums in fp64 do not depend on the order in practice, and so not on which process has which batch
        sums = [torch.zeros_like(parameter, dtype=torch.float64) for parameter in parameters]
        losses = torch.zeros_like(self._counts)

        def add(batch: Batch) -> None:
            found = self._forwards.losses(batch)
            if found.requires_grad:
                (found / self._counts.to(found)).sum().backward()
            self._states.check_gradients()
            losses.add_(found.detach().cpu())
            rows = (
                slice(None) if len(self._counts) == 1 else sorted(set(batch.tasks))
            )  # a batch has few tasks of a bank
            for total, parameter in zip(sums, parameters, strict=True):
                gradient = parameter.grad
                assert gradient is not None  # `check_gradients` has checked that
                total[rows] += gradient[rows]
                parameter.grad = None

        note = self._forwards.each(add, share=True)
        losses = self._processes.sum(losses) / self._counts
        if not losses.isfinite().all():
            raise RuntimeError(f"S0Trainer.train: the loss is {float(losses.mean())} at step {number}")
        gradients = []
        for total, parameter in zip(sums, parameters, strict=True):
            gradients.append((self._processes.sum(total) + 2 * config.l2_lambda * parameter.detach()).float())
            parameter.grad = gradients[-1]
        norms = self._clip(gradients)
        if not norms.isfinite().all():
            raise RuntimeError(f"S0Trainer.train: the gradient is not finite at step {number}")
        self._optimizer.step()
        self._optimizer.zero_grad()
        entry = {"step": number, "loss": float(losses.mean()), "grad_norm": float(norms.norm())}
        if self._states.names is not None:
            for key, values in (("losses", losses), ("grad_norms", norms)):
                entry[key] = dict(zip(self._states.names, values.tolist(), strict=True))
        return entry | note

    @torch.no_grad()
    def _loss(self) -> float:
        """Return the loss of the current states: the mean over tasks of the mean over their examples."""
        losses = torch.zeros_like(self._counts)
        self._forwards.each(lambda batch: losses.add_(self._forwards.losses(batch).cpu()), share=False)
        return float((losses / self._counts).mean())

    def _clip(self, gradients: Sequence[Tensor]) -> Tensor:
        """Scale the gradient of each task down to the allowed norm, in place. Return the norms before that, [tasks]."""
        squares = torch.zeros_like(self._counts)
        for gradient in gradients:
            squares += gradient.double().flatten(1).square().sum(1).cpu()
        factors = (self._config.grad_clip / (squares.sqrt() + 1e-6)).clamp(max=1.0)
        for gradient in gradients:
            gradient *= factors.to(gradient)[:, None, None, None]
        return squares.sqrt()

    @torch.no_grad()
    def check_effect(self) -> None:
        """Raise RuntimeError if S0 does not affect the logits: training would then do nothing, without an error."""
        before = self._forwards.hidden()
        generator = torch.Generator("cpu").manual_seed(0)
        for state in self._parameters:
            noise = torch.randn(state.shape[1:], generator=generator, dtype=state.dtype, device="cpu")
            state.copy_(noise.expand(state.shape))
        after = self._forwards.hidden()
        for state in self._parameters:
            state.zero_()
        if torch.equal(before, after):
            raise RuntimeError(
                "S0Trainer.train: a random initial state leaves the logits unchanged, so there is nothing to learn. "
                "Either the mixers were replaced after swap_modules, or the model forgets its state at once "
                "(decays near zero)."
            )


class EvalMode:
    """Put all modules into evaluation mode for the body of a with statement, then restore their modes."""

    def __init__(self, model: nn.Module):
        self.model = model

    def __enter__(self) -> None:
        self._training = {module: module.training for module in self.model.modules()}
        self.model.eval()

    def __exit__(self, *_) -> None:
        for module, training in self._training.items():
            module.training = training


class Frozen(EvalMode):
    """Also turn off the gradients of weights. They are remembered by name, because accelerate replaces the parameters
    that it loads and offloads."""

    def __enter__(self) -> None:
        super().__enter__()
        self._trainable = {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        self.model.requires_grad_(False)

    def __exit__(self, *_) -> None:
        super().__exit__()
        for name, parameter in self.model.named_parameters():
            if name in self._trainable:
                parameter.requires_grad_(True)
