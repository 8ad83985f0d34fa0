"""On which chips, instruction sets and compilers the kernels were tried: one table, read by docs/supported.md, `env`,
`check` and the tests. It needs nothing but Python.

Tried means: `run`, the tests passed there; `compiled`, all kernels (before 8.0: those of a single token) were compiled
for it ahead of time and never ran; `emulated`, they ran in an emulator; `never`, nobody has looked.
"""

from typing import NamedTuple


class Chip(NamedTuple):
    """A GPU as far as the kernels' sizes and schedules depend on it. `shared` is the bytes of shared memory (AMD: local
    data share) that one program can have, `warp` the threads of a warp (AMD: wavefront)."""

    target: str
    names: str
    processors: int
    shared: int
    warp: int
    tried: str


#: by what Triton and nvcc compile for; `processors` are those of the first name
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
    """A CPU with the instruction set that the compiled kernels use there, and the compilers that build them for it."""

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
    """All that build the kernels for a CPU."""
    return ", ".join(dict.fromkeys(name for row in PROCESSORS for name in row.compilers))


_WORDS = {
    "run": "the kernels ran on one of this kind (an H200)",
    "compiled": "the kernels were compiled for it and have never run on one",
    "never": "nobody has tried the kernels on one",
}


def target_name(properties, hip: str | None) -> str:
    """What is compiled for, of torch's properties of a device; `hip` is torch.version.hip, None beside CUDA."""
    if hip is not None:
        return properties.gcnArchName.partition(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def experience(target: str) -> str:
    """What is known of a GPU, as `env` and `check` say it."""
    return _WORDS[CHIPS[target].tried if target in CHIPS else "never"]
