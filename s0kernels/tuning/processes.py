"""The processes that train together."""

import atexit
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from accelerate import PartialState


class Processes:
    """All of them, and this one; one alone, unless started by `accelerate launch` or the like."""

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
        """Of each value."""
        if self.count == 1:
            return values
        from accelerate.utils import gather

        all_values = gather(torch.tensor([values], device=self._state.device))
        return all_values.amin(0).tolist()  # pyright: ignore[reportAttributeAccessIssue] (likewise)

    def share(self, value: Any) -> list[Any]:
        """The value of each, in their order."""
        if self.count == 1:
            return [value]
        from accelerate.utils import gather_object

        return list(gather_object([value]))

    def alike(self, value: object) -> bool:
        """Whether all have the same."""
        return all(other == value for other in self.share(value))

    def together(self, work: Callable[[], Any], where: range | None = None) -> list[Any]:
        """What `work` returns in each, or in those of `where` alone. An error in one is an error in all."""
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
    """As accelerate knows them: its `PartialState`."""
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
