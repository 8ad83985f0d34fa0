"""The loop of S0 training: batches through a frozen model, gradients of S0 from all processes, Adam."""

from collections.abc import Callable, Sequence
from typing import Any

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
    """One run of training: the states that learn, the batches they learn from, and this process's share of them."""

    def __init__(
        self, model: nn.Module, config: S0Config, states: S0States, batches: Sequence[Batch], run: dict[str, Any]
    ):
        self._model, self._config, self._states, self._batches = model, config, states, batches
        owners = torch.tensor([task for batch in batches for task in batch.tasks])
        self._counts = torch.bincount(owners, minlength=states.tasks).double()
        self._processes = processes()
        self._compare(run)
        self._optimizer = torch.optim.Adam(states.parameters(), lr=config.lr)

    def learn(
        self, example: Example, callbacks: Sequence[Callback], file: Checkpoint | None, every: int, progress: bool
    ) -> list[dict[str, Any]]:
        """The history; the states are those of the last step. `example` is what the effect of S0 is shown on."""
        steps, main = self._config.n_steps, self._processes.is_main_process
        history = [] if file is None else file.read(self._states, self._optimizer)
        if not history:
            self._check_effect(example)
        _checkpoint_layers(self._model)
        done = min(len(history), steps)
        with tqdm(total=steps, initial=done, desc="S0 tuning", unit="step", disable=not (progress and main)) as bar:
            while len(history) < steps:
                entry = self._step(len(history))
                history.append(entry)
                with self._states.attached(self._model):
                    answers = [callback(entry, self._states) for callback in callbacks]
                stop = any(answer is True for answer in answers)
                stop = self._sum(torch.tensor(float(stop))) > 0
                if file is not None and main and (stop or len(history) % every == 0 or len(history) == steps):
                    file.write(self._states, self._optimizer, history)
                bar.set_postfix(loss=f"{entry['loss']:.4f}", refresh=False)
                bar.update()
                if stop:
                    break
        return history

    def _step(self, number: int) -> dict[str, Any]:
        config, parameters = self._config, list(self._states.parameters())
        share = self._batches[self._processes.process_index :: self._processes.num_processes]
        # summed in fp64, the result does not depend on the order, and so not on the number of processes
        sums = [torch.zeros_like(parameter, dtype=torch.float64) for parameter in parameters]
        losses = torch.zeros_like(self._counts)
        for batch in share:
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
        self._optimizer.step()
        self._optimizer.zero_grad()
        entry = {"step": number, "loss": float(losses.mean()), "grad_norm": float(norms.norm())}
        if self._states.names is not None:
            for key, values in (("losses", losses), ("grad_norms", norms)):
                entry[key] = dict(zip(self._states.names, values.tolist(), strict=True))
        return entry

    def losses(self, batches: Sequence[Batch]) -> Tensor:
        """[tasks] mean losses over all examples."""
        with torch.no_grad():
            return sum(self._losses(batch).cpu().double() for batch in batches) / self._counts

    def _losses(self, batch: Batch) -> Tensor:
        several = self._states.tasks > 1
        with self._states.attached(self._model, tasks=batch.tasks if several else 0):
            return batch.losses(self._model, self._states.tasks)

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

    def _compare(self, run: dict[str, Any]) -> None:
        if self._processes.num_processes == 1:
            return
        from accelerate.utils import gather_object

        if any(other != run for other in gather_object([run])):
            raise ValueError("S0Trainer.train: the processes were not given the same data, settings and model")

    @torch.no_grad()
    def _check_effect(self, example: Example) -> None:
        """Refuse to train where S0 does not reach the logits: a run without effect would end without an error."""
        batch = make_batches([example], 1, False, self._model, 0, self._batches[0].device)[0]
        before = self._logits(batch)
        generator = torch.Generator().manual_seed(0)
        for state in self._states.parameters():
            state.copy_(torch.randn(state.shape[1:], generator=generator).expand(state.shape))
        after = self._logits(batch)
        for state in self._states.parameters():
            state.zero_()
        if torch.equal(before, after):
            raise RuntimeError(
                "S0Trainer.train: a random initial state leaves the logits unchanged, so there is nothing to learn. "
                "Either the mixers were replaced after swap_modules, or the model forgets its state at once "
                "(decays near zero)."
            )

    def _logits(self, batch: Batch) -> Tensor:
        with self._states.attached(self._model):
            return batch.logits(self._model)


class Frozen:
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


def _checkpoint_layers(model: nn.Module) -> None:
    """transformers checkpoints layers in training mode only; what is inside them stays in evaluation mode."""
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.training = True


def processes():
    """The processes that train together; one, unless started by `accelerate launch` or the like."""
    from accelerate import PartialState

    return PartialState(cpu=not torch.accelerator.is_available())
