"""The arrival counters of one-token kernels on a GPU: `csrc/cuda/workspace.h` on a stand-in for CUDA's runtime."""

import ctypes
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMPILER = shutil.which("g++") or shutil.which("clang++")
pytestmark = [
    pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="the tests run on an installed package"),
    pytest.mark.skipif(COMPILER is None, reason="there is no g++ or clang++"),
]
GLOBAL = 0


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    file = tmp_path_factory.mktemp("workspace") / "workspace.so"
    flags = ["-std=c++20", "-O1", "-Wall", "-Werror", "-fPIC", "-shared", "-pthread", "-Icsrc", "-Itests/csrc/cuda"]
    subprocess.run([COMPILER, *flags, "tests/csrc/cuda/workspace.cpp", "-o", str(file)], cwd=ROOT, check=True)
    found = ctypes.CDLL(str(file))
    for name in ("new_workspaces", "of", "new_stream"):
        getattr(found, name).restype = ctypes.c_void_p
    found.of.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    found.set_stream.argtypes = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_bool]
    found.most_streams.restype = ctypes.c_int64
    found.what_was_called.restype = ctypes.c_char_p
    return found


class Cuda:
    """The stand-in, with its own workspaces."""

    def __init__(self, library):
        self.library, self.workspaces = library, library.new_workspaces()
        library.set_device(0)
        library.set_full(False)
        self.calls()

    def stream(self, number: int, captured: bool = False, handle: int | None = None) -> int:
        handle = handle or self.library.new_stream()
        self.library.set_stream(handle, number, captured)
        return handle

    def counters(self, stream: int, count: int) -> int | None:
        return self.library.of(self.workspaces, stream, count)

    def calls(self) -> list[str]:
        return self.library.what_was_called().decode().splitlines()


@pytest.fixture
def cuda(library):
    return Cuda(library)


def values(address: int, count: int) -> list[int]:
    return list((ctypes.c_uint32 * count).from_address(address))


def test_calls_of_a_stream_share_one_that_was_filled_with_zeros_once_and_on_that_stream(cuda):
    stream = cuda.stream(7)
    found = cuda.counters(stream, 5)
    assert values(found, 5) == [0] * 5
    assert cuda.calls() == ["malloc 4096", "memset 4096 on 7"]
    assert [cuda.counters(stream, count) for count in (1, 5, 1024)] == [found] * 3
    assert cuda.calls() == []


def test_two_streams_and_two_devices_share_nothing(cuda):
    spans = []
    for device in (0, 1):
        cuda.library.set_device(device)
        for number in (1, 2):  # the same number, such as that of the default stream, on either device
            first = cuda.counters(cuda.stream(number), 1024)
            spans.append((first, first + 4 * 1024))
    spans.sort()
    assert len(set(spans)) == 4
    assert all(end <= begin for (_, end), (begin, _) in pairwise(spans))


def test_growth_leaves_alone_what_kernels_in_flight_use(cuda):
    stream = cuda.stream(3)
    first = cuda.counters(stream, 1000)
    ctypes.c_uint32.from_address(first).value = 5  # a kernel is running
    second = cuda.counters(stream, 1025)
    assert second != first
    assert values(second, 1025) == [0] * 1025
    assert values(first, 1) == [5]
    assert cuda.calls()[2:] == ["malloc 8192", "memset 8192 on 3"]  # twice the size, so allocations are rare
    assert cuda.counters(stream, 10**6) not in (first, second)
    assert cuda.calls() == ["malloc 4000000", "memset 4000000 on 3"]
    assert cuda.counters(stream, 2) not in (first, second)


def test_a_stream_with_the_handle_of_one_that_is_gone_gets_another(cuda):
    handle = cuda.stream(1)
    first = cuda.counters(handle, 8)
    assert cuda.counters(cuda.stream(2, handle=handle), 8) != first


def test_a_captured_call_brings_its_own(cuda):
    """It does so even if the stream has a workspace, which later calls use again."""
    handle = cuda.stream(1)
    first = cuda.counters(handle, 8)
    cuda.calls()
    assert cuda.counters(cuda.stream(1, captured=True, handle=handle), 8) is None
    assert cuda.counters(cuda.stream(2, captured=True), 8) is None
    assert cuda.calls() == []
    assert cuda.counters(cuda.stream(1, handle=handle), 8) == first


def test_without_memory_a_call_brings_its_own_and_a_later_one_does_not(cuda):
    stream = cuda.stream(1)
    first = cuda.counters(stream, 8)
    cuda.library.set_full(True)
    assert cuda.counters(cuda.stream(2), 8) is None
    assert cuda.counters(stream, 5000) is None
    assert cuda.library.last_error() == 0, "who asks next would find this one's error"
    assert cuda.counters(stream, 8) == first
    cuda.library.set_full(False)
    assert values(cuda.counters(stream, 5000), 5000) == [0] * 5000


def test_allocating_does_not_end_the_capture_of_another_thread(cuda):
    """The stand-in refuses to allocate as CUDA does while any thread captures a graph, except when asked to relax."""
    assert cuda.library.capture_mode() == GLOBAL
    assert cuda.counters(cuda.stream(1), 8) is not None
    assert cuda.library.capture_mode() == GLOBAL
    cuda.library.set_full(True)
    assert cuda.counters(cuda.stream(2), 8) is None
    assert cuda.library.capture_mode() == GLOBAL


def test_streams_without_end_do_not_take_memory_without_end(cuda):
    most = cuda.library.most_streams()
    found = [cuda.counters(cuda.stream(number), 1) for number in range(most)]
    assert len(set(found)) == most
    cuda.calls()
    assert cuda.counters(cuda.stream(most), 1) is None
    assert cuda.counters(cuda.stream(0), 1) == found[0]
    assert cuda.calls() == []
    assert cuda.counters(cuda.stream(0), 2000) is not None  # a known stream may still grow


def test_threads_that_ask_at_once(cuda):
    with ThreadPoolExecutor(4) as pool:
        for number in range(20):
            found = set(pool.map(cuda.counters, [cuda.stream(number)] * 4, [16] * 4))
            assert len(found) == 1
