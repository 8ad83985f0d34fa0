"""Communication between the processes of a run."""

import atexit
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from accelerate import PartialState


class Processes:
    """The processes of a run. There is one, unless the program was started by `accelerate launch` or a similar
    command."""

    def __init__(self):
        self._state = processes()
        self.count, self.index = self._state.num_processes, self._state.process_index
        self.is_main = self._state.is_main_process

    def sum(self, value: Tensor) -> Tensor:
        if self.count == 1:
            return value
        from accelerate.utils import reduce

        total = reduce(value.to(self._state.device), reduction="sum")
        return total.to(value.device)  # pyright: ignore[reportAttributeAccessIssue] (of a tensor it is one)

    def any(self, value: bool) -> bool:
        return bool(self.sum(torch.tensor(float(value))) > 0)

    def least(self, values: list[int]) -> list[int]:
        """Return the minimum over the processes of each value."""
        if self.count == 1:
            return values
        from accelerate.utils import gather

        all_values = gather(torch.tensor([values], device=self._state.device))
        return all_values.amin(0).tolist()  # pyright: ignore[reportAttributeAccessIssue] (likewise)

    def share(self, value: Any) -> list[Any]:
        """Return the values of all processes, in their order."""
        if self.count == 1:
            return [value]
        from accelerate.utils import gather_object

        return list(gather_object([value]))

    def alike(self, value: object) -> bool:
        """Whether all processes have the same value."""
        return all(other == value for other in self.share(value))

    def together(self, work: Callable[[], Any], where: range | None = None) -> list[Any]:
        """Run `work` in every process, or only in those of `where`, and return the results. An error in one process is
        raised in all."""
        found, failure = None, None
        try:
            found = work() if where is None or self.index in where else None
        except Exception as error:
            failure = error
        told = self.share((found, None if failure is None else f"{type(failure).__name__}: {failure}"))
        if failure is not None:
            raise failure
        for index, (_, text) in enumerate(told):
            if text is not None:
                raise RuntimeError(f"process {index} has failed: {text}")
        return [value for value, _ in told]


def processes() -> "PartialState":
    """Return accelerate's `PartialState`."""
    from accelerate import PartialState

    distributed = torch.distributed
    theirs = distributed.is_available() and distributed.is_initialized()
    state = PartialState(cpu=not torch.accelerator.is_available())
    if not theirs and distributed.is_available() and distributed.is_initialized():
        atexit.register(_end_process_group, os.getpid())
    return state


def _end_process_group(process: int) -> None:
    """End the process group in the process that made it. A gloo thread that still holds a tensor while Python shuts
    down would abort the process."""
    if os.getpid() == process and torch.distributed.is_initialized() and torch.distributed.get_backend() == "gloo":
        torch.distributed.destroy_process_group()
