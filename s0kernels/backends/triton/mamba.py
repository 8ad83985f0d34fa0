"""Mamba-2 SSD: which kernels run, with which sizes, on which memory."""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from s0kernels.backends.triton.launch import (
    Table,
    Tiles,
    choose_tiles,
    dot_precision,
    forced_schedule,
    launch,
    power_of_two,
    strides,
    target_of,
)
from s0kernels.backends.triton.mamba_backward import (
    ssd_groups_bwd_kernel,
    ssd_heads_bwd_kernel,
    ssd_scan_bwd_kernel,
    ssd_sums_bwd_kernel,
)
from s0kernels.backends.triton.mamba_forward import ROWS, ssd_output_fwd_kernel, ssd_prepare_kernel, ssd_scan_fwd_kernel
from s0kernels.backends.triton.mamba_step import ssd_step_kernel
from s0kernels.backends.triton.states import bank_size, reduce_state_grad, state_strides
from s0kernels.backends.triton.tiles import slot_count
from s0kernels.calls import Grads, Pool, SSDInputs, SSDOptions, Start, Wanted

#: By stage and bytes of the dtype: the tile (of P, or of what a loop sums over), warps, pipeline stages. What each
#: takes of a chip: `python -m s0kernels aot`.
TILES: dict[tuple[str, int], Table] = {
    ("prepare", 2): {0: (Tiles(64, 4, 2),), 80: (Tiles(64, 8, 2),)},
    ("scan", 2): {
        0: (Tiles(32, 4, 1),),
        80: (Tiles(64, 8, 2, 16640, 384), Tiles(32, 8, 2)),
        90: (Tiles(64, 8, 2),),
        120: (Tiles(64, 8, 2, 16640, 384), Tiles(32, 8, 2)),
    },
    ("states", 2): {0: (Tiles(64, 4, 2),)},
    ("output", 2): {0: (Tiles(64, 4, 2),)},
    ("heads", 2): {0: (Tiles(32, 4, 1),), 80: (Tiles(64, 8, 2),)},
    ("groups", 2): {0: (Tiles(64, 4, 2),), 80: (Tiles(64, 8, 2),)},
    ("step", 2): {0: (Tiles(16, 4, 1),)},
    ("prepare", 4): {0: (Tiles(32, 4, 1),), 80: (Tiles(32, 8, 1),)},
    ("scan", 4): {0: (Tiles(16, 4, 1),), 80: (Tiles(16, 8, 1),)},
    ("states", 4): {0: (Tiles(32, 4, 1),), 80: (Tiles(32, 8, 1),)},
    ("output", 4): {0: (Tiles(32, 4, 1),), 80: (Tiles(32, 8, 1),)},
    ("heads", 4): {0: (Tiles(16, 4, 1),), 80: (Tiles(16, 8, 1),)},
    ("groups", 4): {0: (Tiles(32, 4, 1),), 80: (Tiles(32, 8, 1),)},
    ("step", 4): {0: (Tiles(16, 4, 1),)},
}
#: the widest N that a program of the fused scan has at once
WIDEST = 256
#: inputs without tokens, whose gradients are sums over all chunks
_SCALARS = ("A", "D", "dt_bias")


class _HeadGrads(NamedTuple):
    """What the kernel of the heads writes, in its order; None where it is not wanted."""

    dx: Tensor | None
    dz: Tensor | None
    ddt: Tensor | None
    dcb: Tensor | None
    dA: Tensor | None  # [slots, H] each: what every chunk adds
    dD: Tensor | None
    dbias: Tensor | None


class _Call:
    """The sizes of one call, and the launches that forward and backward share."""

    def __init__(self, inputs: SSDInputs, P: int, start: Start, options: SSDOptions):
        C, cu_seqlens = inputs.C, start.cu_seqlens
        self.inputs, self.start, self.cu_seqlens = inputs, start, cu_seqlens
        _, self.dt, self.A, _, self.C, self.D, self.z, self.dt_bias = inputs
        self.softplus, self.limit = options.dt_softplus, options.dt_limit
        self.B, self.T, self.G, self.N = C.shape
        self.H, self.P = self.dt.shape[2], P
        self.sequences = start.sequences(self.B)
        if self.sequences == 0 and self.T * self.B > 0:
            raise ValueError(f"cu_seqlens must start at 0 and end at T = {self.T}, got no sequences")
        self.bytes = C.element_size()
        longest = 64 if self.bytes == 2 else 32
        self.BT = min(longest, power_of_two(options.chunk_size or longest))
        self.slots = slot_count(self.B, self.T, self.sequences, self.BT, cu_seqlens is not None)
        self.sizes = {"H": self.H, "G": self.G, "P": P, "N": self.N}
        self.blocks = {"BT": self.BT, "BQ": min(1024, power_of_two(self.sequences))}
        self.blocks["PRECISION"] = dot_precision(self.bytes, C.device)

    def tiles(self, stage: str) -> Tiles:
        return choose_tiles(TILES[stage, self.bytes], self.C.device, power_of_two(self.N))

    def scratch(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.C.dtype, device=self.C.device)

    def tokens(self) -> Tensor:
        """[B, T, H, P] in the dtype of C."""
        return self.scratch(self.B, self.T, self.H, self.P)

    def chunk_states(self) -> Tensor:
        return self.scratch(self.slots, self.H, self.P, self.N)

    def pairs(self, heads: int) -> Tensor:
        return self.scratch(self.slots, heads, self.BT, self.BT)

    def final_states(self, sequences: int) -> Tensor:
        return self.scratch(sequences, self.H, self.P, self.N, dtype=torch.float32)

    def prepare(self, B: Tensor | None = None, *, cb: Tensor | None = None, p: Tensor | None = None) -> None:
        """gates, and those given of cb and p, of all chunks."""
        self.gates = self.scratch(self.slots, self.H, ROWS.value, self.BT, dtype=torch.float32)
        tiles = self.tiles("prepare")
        heads = self._heads_of_a_program()
        launch(
            ssd_prepare_kernel,
            self.slots * (self.H // heads),
            *(self.dt, self.A, B, self.C, self.dt_bias, self.cu_seqlens, cb, p, self.gates),
            *(*self.limit, self.T, self.sequences, heads, self.N),
            *(self.dt.stride(), strides(B, 4), self.C.stride(), *self.A.stride(), *strides(self.dt_bias, 1)),
            H=self.H,
            G=self.G,
            SOFTPLUS=self.softplus,
            BI=tiles.tile,
            **self.blocks,
            tiles=tiles,
        )

    def _heads_of_a_program(self) -> int:
        """Of those that share C B^T, as many as leave every multiprocessor two programs."""
        group = self.H // self.G
        programs = 2 * target_of(self.C.device).processors
        fit = [n for n in range(1, group + 1) if group % n == 0 and self.slots * (self.H // n) >= programs]
        return max(fit, default=1)

    def scan(self, p, *, y=None, h=None, ht=None) -> None:
        """With y, a program has all of N, without a tile of it."""
        tiles, BP, BN = self._walk_tiles(y is not None)
        x, B, start = self.inputs.x, self.inputs.B, self.start
        launch(
            ssd_scan_fwd_kernel,
            self._walks(BP, BN),
            *(x, B, self.C, self.D, self.z, p, self.gates, *start, y, h, ht),
            *(self.T, self.sequences, bank_size(start.state)),
            *(x.stride(), B.stride(), self.C.stride(), strides(self.z, 4), state_strides(start.state)),
            *strides(self.D, 1),
            **self.sizes,
            BP=BP,
            BN=BN,
            **self.blocks,
            tiles=tiles,
        )

    def _walk_tiles(self, whole: bool) -> tuple[Tiles, int, int]:
        tiles = self.tiles("scan" if whole else "states")
        BN = power_of_two(self.N)
        return tiles, min(tiles.tile, power_of_two(self.P)), BN if whole else min(tiles.tile, BN)

    def _walks(self, BP: int, BN: int) -> int:
        return self.sequences * self.H * triton.cdiv(self.P, BP) * max(1, triton.cdiv(self.N, BN))

    def is_split(self) -> bool:
        """Whether a kernel of its own makes the output, for all chunks at once: where a tile of P with all of N has no
        room in the registers, or walks are long and so few that most of the chip would watch."""
        if self.N > WIDEST:
            return True
        if forced := forced_schedule():
            return forced == "split"
        long = 1024 * self.sequences <= self.B * self.T
        return long and 2 * self._walks(*self._walk_tiles(True)[1:]) <= target_of(self.C.device).processors

    def output(self, p: Tensor, h: Tensor, y: Tensor) -> None:
        tiles, x = self.tiles("output"), self.inputs.x
        BP = min(tiles.tile, power_of_two(self.P))
        launch(
            ssd_output_fwd_kernel,
            self.slots * self.H * triton.cdiv(self.P, BP),
            *(x, self.C, self.D, self.z, p, self.gates, h, self.cu_seqlens, y, self.T, self.sequences, self.N),
            *(x.stride(), self.C.stride(), strides(self.z, 4), *strides(self.D, 1)),
            **self.sizes,
            BP=BP,
            BI=tiles.tile,
            **self.blocks,
            tiles=tiles,
        )

    def scan_backward(self, grads: Grads, *, h=None, dh=None, dh0=None) -> None:
        tiles, BP, BN = self._walk_tiles(False)
        x, B, start, (do, dht) = self.inputs.x, self.inputs.B, self.start, grads
        walks = self._walks(BP, BN)
        backwards = 0 if dh is None and dh0 is None else walks
        launch(
            ssd_scan_bwd_kernel,
            backwards if h is None else backwards + walks,
            *(x, B, self.C, self.z, self.gates, *start, do, dht, h, dh, dh0),
            *(self.T, self.sequences, bank_size(start.state), backwards),
            *(strides(x, 4), strides(B, 4), self.C.stride(), strides(self.z, 4), state_strides(start.state)),
            *(do.stride(), strides(dht, 4)),
            **self.sizes,
            BP=BP,
            BN=BN,
            **self.blocks,
            tiles=tiles,
        )

    def heads_backward(self, cb, do, h, dh, out: _HeadGrads, decays: bool) -> None:
        tiles, x, B = self.tiles("heads"), self.inputs.x, self.inputs.B
        BP = min(32, power_of_two(self.P))
        launch(
            ssd_heads_bwd_kernel,
            self.slots * self.H,
            *(x, self.dt, self.A, B, self.C, self.D, self.z, self.dt_bias, cb, self.gates, do, h, dh, self.cu_seqlens),
            *(*out, *self.limit, self.T, self.sequences, self.N, triton.cdiv(self.P, BP)),
            *(x.stride(), self.dt.stride(), B.stride(), self.C.stride(), strides(self.z, 4), do.stride()),
            *(*self.A.stride(), *strides(self.D, 1), *strides(self.dt_bias, 1)),
            **self.sizes,
            DECAYS=decays,
            SOFTPLUS=self.softplus,
            BP=BP,
            BI=tiles.tile,
            **self.blocks,
            tiles=tiles,
        )

    def groups_backward(self, do, h, dh, dcb, *, dB, dC) -> None:
        tiles, x, B = self.tiles("groups"), self.inputs.x, self.inputs.B
        BN = min(tiles.tile, power_of_two(self.N))
        wanted = (dB is not None) + (dC is not None)
        launch(
            ssd_groups_bwd_kernel,
            self.slots * self.G * wanted * triton.cdiv(self.N, BN),
            *(x, B, self.C, self.z, self.gates, do, h, dh, dcb, self.cu_seqlens, dB, dC),
            *(self.T, self.sequences, self.H // self.G, self.P),
            *(x.stride(), B.stride(), self.C.stride(), strides(self.z, 4), do.stride()),
            **self.sizes,
            BP=min(tiles.tile, power_of_two(self.P)),
            BN=BN,
            **self.blocks,
            tiles=tiles,
        )

    def add_slots(self, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        """[slots, H] to [H], each."""
        sums = {name: self.scratch(self.H, dtype=torch.float32) for name in parts}
        if sums:
            rows = [found.get(name) for found in (parts, sums) for name in _SCALARS]
            launch(ssd_sums_bwd_kernel, self.H, *rows, self.slots, self.H, BS=256, tiles=Tiles(256, 4, 1))
        return sums


def ssd_forward(
    inputs: SSDInputs, start: Start, options: SSDOptions, output_final_state: bool
) -> tuple[Tensor, Tensor]:
    call = _Call(inputs, inputs.x.shape[3], start, options)
    y = call.tokens()
    final = call.final_states(call.sequences if output_final_state else 0)
    ht = final if output_final_state else None
    p = call.pairs(call.H)
    call.prepare(inputs.B, p=p)
    if call.is_split():
        h = call.chunk_states()
        call.scan(p, h=h, ht=ht)
        call.output(p, h, y)
    else:
        call.scan(p, y=y, ht=ht)
    return y, final


def ssd_backward(
    grads: Grads, inputs: SSDInputs, start: Start, options: SSDOptions, wanted: Wanted
) -> dict[str, Tensor]:
    C, names = inputs.C, wanted.names
    P = grads.output.shape[3] if grads.output is not None else grads.final_state.shape[2]
    call = _Call(inputs, P, start, options)
    doutput = C.new_zeros(1).expand(*inputs.dt.shape, P) if grads.output is None else grads.output.to(C.dtype)
    others, pairs = names - {"initial_state"}, names & {"B", "C"}
    decays = bool(names & {"dt", "A", "dt_bias"})
    cb = call.pairs(call.G) if others else None
    call.prepare(inputs.B if others else None, cb=cb)
    h = call.chunk_states() if decays or names & {"z", "C"} else None
    dh = call.chunk_states() if decays or names & {"x", "B"} else None
    dh0 = call.final_states(call.sequences) if "initial_state" in names else None
    call.scan_backward(Grads(doutput, grads.final_state), h=h, dh=dh, dh0=dh0)
    found = {}
    if others:
        of_tokens = {name: getattr(inputs, name) for name in ("x", "z", "dt", "B", "C") if name in names}
        found = {name: torch.empty(t.shape, dtype=t.dtype, device=t.device) for name, t in of_tokens.items()}
        parts = {name: call.scratch(call.slots, call.H, dtype=torch.float32) for name in _SCALARS if name in names}
        dcb = call.pairs(call.H) if pairs else None
        out = _HeadGrads(*map(found.get, ("x", "z", "dt")), dcb, *map(parts.get, _SCALARS))
        call.heads_backward(cb, doutput, h, dh, out, decays)
        if pairs:
            call.groups_backward(doutput, h, dh, dcb, dB=found.get("B"), dC=found.get("C"))
        found |= call.add_slots(parts)
    if "initial_state" in names:
        found["initial_state"] = reduce_state_grad(dh0, wanted.state_shape, start.indices)
    return found


def ssd_step(inputs: SSDInputs, pool: Pool, options: SSDOptions) -> Tensor:
    x, dt, A, B, C, D, z, dt_bias = inputs
    (rows, H, P), (_, G, N) = x.shape, B.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tiles = choose_tiles(TILES["step", x.element_size()], x.device)
    BP = min(tiles.tile, power_of_two(P))
    launch(
        ssd_step_kernel,
        rows * H * triton.cdiv(P, BP),
        *(x, dt, A, B, C, D, z, dt_bias, *pool, y, *options.dt_limit, pool.state.shape[0]),
        *(x.stride(), dt.stride(), B.stride(), C.stride(), strides(z, 3), pool.state.stride()),
        *(*A.stride(), *strides(D, 1), *strides(dt_bias, 1)),
        H=H,
        G=G,
        P=P,
        N=N,
        SOFTPLUS=options.dt_softplus,
        BP=BP,
        BN=power_of_two(N),
        tiles=tiles,
    )
    return y
