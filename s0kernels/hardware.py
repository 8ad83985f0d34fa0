"""The chips, instruction sets and compilers that the kernels were tried on: one table for docs/supported.md, `env`,
`check` and the tests. It needs nothing but Python.

The values of `tried`: `run`, the tests passed there; `compiled`, all kernels (before sm_80: only the one-token kernels)
    were compiled ahead of time and never ran; `emulated`, the tests passed in an emulator; `never`, nobody has tried
    it.
"""

from typing import NamedTuple


class Chip(NamedTuple):
    """The properties of a GPU that decide the sizes and schedules of kernels. `shared` is the number of bytes of shared
    memory (AMD: local data share) that one program can have, `warp` the number of threads in a warp (AMD:
    wavefront)."""

    target: str
    names: str
    processors: int
    shared: int
    warp: int
    tried: str


#: by the name of the target in Triton and nvcc; `processors` is that of the first chip named
CHIPS = {
    chip.target: chip
    for chip in (
        Chip("sm_75", "T4", 40, 65536, 32, "compiled"),
        Chip("sm_80", "A100", 108, 166912, 32, "compiled"),
        Chip("sm_86", "A10G, RTX 3090", 80, 101376, 32, "compiled"),
        Chip("sm_89", "L4, L40S, RTX 4090", 58, 101376, 32, "compiled"),
        Chip("sm_90", "H200 (H100 and GH200 take the same code)", 132, 232448, 32, "run"),
        Chip("sm_100", "B200", 148, 232448, 32, "compiled"),
        Chip("sm_120", "RTX 5090", 170, 101376, 32, "compiled"),
        Chip("gfx942", "MI300X", 304, 65536, 64, "compiled"),
        Chip("gfx950", "MI350X", 256, 163840, 64, "compiled"),
    )
}


class Processor(NamedTuple):
    """A CPU architecture, the instruction set that the compiled kernels use on it, and the compilers that build
    them."""

    architecture: str
    instructions: str
    compilers: tuple[str, ...]
    tried: str


_X86_COMPILERS = ("g++ 11", "g++ 12", "clang 14", "clang 16")

PROCESSORS = (
    Processor("x86-64", "AVX-512", _X86_COMPILERS, "run"),
    Processor("x86-64", "AVX2", _X86_COMPILERS, "run"),
    Processor("x86-64", "portable", _X86_COMPILERS, "run"),
    Processor("aarch64", "portable (NEON)", ("g++ 12", "clang 16"), "emulated"),
    Processor("aarch64, macOS", "portable (NEON)", ("clang 22",), "compiled"),
    Processor("x86-64, macOS", "AVX-512, AVX2, portable", ("clang 22",), "compiled"),
)


def compilers() -> str:
    """Return the names of all compilers that build the kernels for a CPU."""
    return ", ".join(dict.fromkeys(name for row in PROCESSORS for name in row.compilers))


_WORDS = {
    "run": "the kernels ran on a GPU of this kind (an H200)",
    "compiled": "the kernels were compiled for this GPU and have never run on one",
    "never": "nobody has tried the kernels on this GPU",
}


def target_name(properties, hip: str | None) -> str:
    """Return the name of the compilation target of a device. `properties` are torch's device properties; `hip` is
    `torch.version.hip`, which is None with CUDA."""
    if hip is not None:
        return properties.gcnArchName.partition(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def experience(target: str) -> str:
    """Return the sentence by which `env` and `check` say how far the kernels were tried on a GPU."""
    return _WORDS[CHIPS[target].tried if target in CHIPS else "never"]
