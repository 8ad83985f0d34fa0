"""Comparing final answers with math-verify, in a process that can be given up.

math-verify parses what a model wrote and hands it to sympy, which a power tower can keep busy, or fill memory with, for
as long as anyone waits; its own timeout is an alarm that such a computation does not hear.
"""

import logging
import multiprocessing
import resource
from collections.abc import Sequence

from tqdm import tqdm

SECONDS = 10.0
MEMORY = 2 << 30  # bytes of address space on top of what the process has when it starts


def same_answers(pairs: Sequence[tuple[str, str]], seconds: float = SECONDS) -> list[bool]:
    """For each (right answer, text that ends in an answer) whether they agree. No agreement in time is none.

    Raises ImportError where math-verify or pebble is not installed.
    """
    try:
        import math_verify  # noqa: F401
        from pebble import ProcessPool
    except ImportError as error:
        raise ImportError(f"answers are compared by math-verify: pip install 's0kernels[eval]' ({error})") from None

    # spawned, since this process may have threads, and one at a time, since models need the cores
    context = multiprocessing.get_context("spawn")
    with ProcessPool(max_workers=1, context=context, initializer=_prepare) as pool:
        # not `map`, whose results are also given up where a new process takes long to start
        found = [pool.schedule(_same, args=[pair], timeout=seconds) for pair in pairs]
        try:
            return [_result(future) for future in tqdm(found, desc="comparing answers", unit="answer", leave=False)]
        except BaseException:
            pool.stop()  # or leaving the pool waits for all of them
            raise


def _result(future) -> bool:
    from concurrent.futures import BrokenExecutor

    from pebble import ProcessExpired

    try:
        return future.result()
    except BrokenExecutor:  # the process does not start at all
        raise
    except (TimeoutError, ProcessExpired, MemoryError):
        return False


def _prepare() -> None:
    import math_verify  # noqa: F401, now, because this takes seconds that no answer should lose

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # which warns that its own timeout is off
    with open("/proc/self/statm") as statm:
        used = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))


def _same(pair: tuple[str, str]) -> bool:
    from math_verify import parse, verify

    gold, text = pair
    return bool(verify(parse(gold, parsing_timeout=None), parse(text, parsing_timeout=None), timeout_seconds=None))
