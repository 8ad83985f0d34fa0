"""The gated delta rule: which kernels run, with which sizes, on which memory."""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from s0kernels.backends.triton.delta_backward import (
    gated_delta_rule_inputs_bwd_kernel,
    gated_delta_rule_pairs_bwd_kernel,
    gated_delta_rule_scan_bwd_kernel,
)
from s0kernels.backends.triton.delta_forward import (
    ROWS,
    gated_delta_rule_output_fwd_kernel,
    gated_delta_rule_prepare_fwd_kernel,
    gated_delta_rule_scan_fwd_kernel,
)
from s0kernels.backends.triton.delta_step import gated_delta_rule_step_kernel
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
from s0kernels.backends.triton.states import bank_size, reduce_state_grad, state_strides
from s0kernels.backends.triton.tiles import slot_count
from s0kernels.calls import DeltaInputs, DeltaOptions, Grads, Pool, Start, Wanted

#: By stage and bytes of the dtype: the tile (of V, where there is one), warps, pipeline stages. What each takes of a
#: chip: `python -m s0kernels aot`.
TILES: dict[tuple[str, int], Table] = {
    ("prepare", 2): {0: (Tiles(0, 4, 1),), 80: (Tiles(0, 8, 1),), 90: (Tiles(0, 4, 1),)},
    ("scan", 2): {
        0: (Tiles(32, 4, 1),),
        80: (Tiles(64, 8, 2, 33280, 384), Tiles(32, 8, 1)),
        90: (Tiles(64, 4, 2),),
        100: (Tiles(64, 8, 2),),
        120: (Tiles(64, 8, 2, 33280, 384), Tiles(32, 8, 1)),
    },
    ("output", 2): {0: (Tiles(64, 4, 2),)},
    ("pairs", 2): {0: (Tiles(32, 4, 1),), 80: (Tiles(32, 8, 2),), 90: (Tiles(32, 4, 1),)},
    ("inputs", 2): {0: (Tiles(32, 4, 1),), 80: (Tiles(32, 8, 2),), 90: (Tiles(32, 8, 1),)},
    ("step", 2): {0: (Tiles(32, 4, 1),)},
    ("prepare", 4): {0: (Tiles(0, 4, 1),), 80: (Tiles(0, 8, 1),)},
    ("scan", 4): {0: (Tiles(32, 4, 1),), 80: (Tiles(32, 8, 1),)},
    ("output", 4): {0: (Tiles(32, 4, 1),), 80: (Tiles(32, 8, 1),)},
    ("pairs", 4): {0: (Tiles(16, 4, 1),), 80: (Tiles(16, 8, 1),)},
    ("inputs", 4): {0: (Tiles(16, 4, 1),), 80: (Tiles(16, 8, 1),)},
    ("step", 4): {0: (Tiles(32, 4, 1),)},
}


class _InputGrads(NamedTuple):
    """What the kernels of the inputs write; None where it is not wanted."""

    dq: Tensor | None
    dk: Tensor | None
    dg: Tensor | None
    dbeta: Tensor | None


class _Call:
    """The sizes of one call, and the launches that forward and backward share."""

    def __init__(self, inputs: DeltaInputs, V: int, start: Start, options: DeltaOptions):
        q, cu_seqlens = inputs.q, start.cu_seqlens
        self.q, self.k, self.v, self.g, self.beta = inputs
        self.start, self.cu_seqlens = start, cu_seqlens
        self.scale, self.normalise = options.scale, options.use_qk_l2norm
        self.B, self.T, self.H, self.K = q.shape
        self.HV, self.V = self.g.shape[2], V
        self.N = start.sequences(self.B)
        if self.N == 0 and self.T * self.B > 0:
            raise ValueError(f"cu_seqlens must start at 0 and end at T = {self.T}, got no sequences")
        self.bytes = q.element_size()
        longest = 64 if self.bytes == 2 else 32
        self.BT = min(longest, power_of_two(options.chunk_size or longest))
        self.slots = slot_count(self.B, self.T, self.N, self.BT, cu_seqlens is not None)
        self.sizes = {"H": self.H, "HV": self.HV, "K": self.K}
        self.blocks = {"BT": self.BT, "BK": power_of_two(self.K), "BN": min(1024, power_of_two(self.N))}
        self.blocks["PRECISION"] = dot_precision(self.bytes, q.device)
        self.tile = min(self.tiles("scan").tile, power_of_two(V))
        #: a scan has a program for each (tile of V, head, sequence), and each walks its chunks in turn
        self.walks = self.N * self.HV * triton.cdiv(V, self.tile)
        self.split = self._split()

    def _split(self) -> bool:
        """Whether a kernel of its own makes the output, for all chunks at once: where walks are long and so few that
        most of the chip would watch."""
        if forced := forced_schedule():
            return forced == "split"
        return 4 * self.walks <= target_of(self.q.device).processors and self.B * self.T >= 1024 * self.N

    def tiles(self, stage: str) -> Tiles:
        return choose_tiles(TILES[stage, self.bytes], self.q.device, self.blocks["BK"])

    def scratch(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.q.dtype, device=self.q.device)

    def tokens(self) -> Tensor:
        """[B, T, HV, V] in the dtype of q."""
        return self.scratch(self.B, self.T, self.HV, self.V)

    def chunk_states(self) -> Tensor:
        return self.scratch(self.slots, self.HV, self.V, self.K)

    def pairs(self) -> Tensor:
        return self.scratch(self.slots, self.HV, self.BT, self.BT)

    def prepare(self) -> None:
        """w, p and gates of all chunks."""
        self.w, self.p = (self.pairs() for _ in range(2))
        self.gates = self.scratch(self.slots, self.HV, ROWS.value, self.BT, dtype=torch.float32)
        launch(
            gated_delta_rule_prepare_fwd_kernel,
            self.slots * self.HV,
            *(self.q, self.k, self.g, self.beta, self.cu_seqlens, self.w, self.p, self.gates),
            *(self.scale, self.T, self.N),
            *(self.q.stride(), self.k.stride(), self.g.stride(), self.beta.stride()),
            **self.sizes,
            NORMALISE=self.normalise,
            **self.blocks,
            tiles=self.tiles("prepare"),
        )

    def scan(self, *, o=None, r=None, h=None, ht=None) -> None:
        launch(
            gated_delta_rule_scan_fwd_kernel,
            self.walks,
            *(self.q, self.k, self.v, self.w, self.p, self.gates, *self.start),
            *(o, r, h, ht, self.T, self.N, bank_size(self.start.state)),
            *(self.q.stride(), self.k.stride(), self.v.stride(), state_strides(self.start.state)),
            **self.sizes,
            V=self.V,
            BV=self.tile,
            **self.blocks,
            tiles=self.tiles("scan"),
        )

    def output(self, r: Tensor, h: Tensor, o: Tensor) -> None:
        tiles = self.tiles("output")
        tile = min(tiles.tile, power_of_two(self.V))
        launch(
            gated_delta_rule_output_fwd_kernel,
            self.slots * self.HV * triton.cdiv(self.V, tile),
            *(self.q, self.p, self.gates, r, h, self.cu_seqlens, o, self.T, self.N, self.q.stride()),
            **self.sizes,
            V=self.V,
            BV=tile,
            **self.blocks,
            tiles=tiles,
        )

    def scan_backward(self, grads: Grads, *, dv, dh0, r=None, h=None, dh=None) -> None:
        """With r, h and dh the states are recomputed beside it."""
        again = r is not None
        v, start = (self.v, self.start) if again else (None, Start(cu_seqlens=self.cu_seqlens))
        do, dht = grads
        launch(
            gated_delta_rule_scan_bwd_kernel,
            2 * self.walks if again else self.walks,
            *(self.q, self.k, v, self.w, self.p, self.gates, *start),
            *(do, dht, r, dv, h, dh, dh0, self.T, self.N, bank_size(start.state), self.walks),
            *(self.q.stride(), self.k.stride(), strides(v, 4), state_strides(start.state)),
            *(strides(do, 4), strides(dht, 4)),
            **self.sizes,
            V=self.V,
            BV=self.tile,
            **self.blocks,
            tiles=self.tiles("scan"),
        )

    def inputs_backward(self, do, r, dv, h, dh, out: _InputGrads) -> None:
        dm, dp = self.pairs(), self.pairs()
        pg, pbeta = (self.scratch(self.B, self.T, self.HV, dtype=torch.float32) for _ in range(2))
        tiles = self.tiles("pairs")
        launch(
            gated_delta_rule_pairs_bwd_kernel,
            self.slots * self.HV,
            *(self.q, self.k, self.g, self.beta, self.gates, do, r, dv, h, dh, self.cu_seqlens),
            *(dm, dp, pg, pbeta),
            *(self.scale, self.T, self.N, self.V),
            *(self.q.stride(), self.k.stride(), self.g.stride(), self.beta.stride(), strides(do, 4)),
            **self.sizes,
            V=self.V,
            BI=tiles.tile,
            **self.blocks,
            tiles=tiles,
        )
        tiles = self.tiles("inputs")
        launch(
            gated_delta_rule_inputs_bwd_kernel,
            self.slots * self.H,
            *(self.q, self.k, self.beta, self.gates, do, r, dv, h, dh, dm, dp, self.cu_seqlens),
            *(out.dq, out.dk, pg, pbeta, out.dg, out.dbeta, self.T, self.N, self.HV // self.H, self.V),
            *(self.q.stride(), self.k.stride(), self.beta.stride(), strides(do, 4)),
            **self.sizes,
            V=self.V,
            NORMALISE=self.normalise,
            BI=tiles.tile,
            BR=power_of_two(self.HV // self.H, 1),
            **self.blocks,
            tiles=tiles,
        )


def gated_delta_rule_forward(
    inputs: DeltaInputs, start: Start, options: DeltaOptions, output_final_state: bool
) -> tuple[Tensor, Tensor]:
    call = _Call(inputs, inputs.v.shape[3], start, options)
    o = call.tokens()
    shape = (call.N if output_final_state else 0, call.HV, call.K, call.V)
    final = call.scratch(*shape, dtype=torch.float32)
    ht = final if output_final_state else None
    call.prepare()
    if call.split:
        r, h = call.tokens(), call.chunk_states()
        call.scan(r=r, h=h, ht=ht)
        call.output(r, h, o)
    else:
        call.scan(o=o, ht=ht)
    return o, final


def gated_delta_rule_backward(
    grads: Grads, inputs: DeltaInputs, start: Start, options: DeltaOptions, wanted: Wanted
) -> dict[str, Tensor]:
    names = wanted.names
    V = grads.output.shape[3] if grads.output is not None else grads.final_state.shape[3]
    call = _Call(inputs, V, start, options)
    if grads.output is not None:
        grads = grads._replace(output=grads.output.to(inputs.q.dtype))
    others = names & {"q", "k", "g", "beta"}
    dv = call.tokens() if others or "v" in names else None
    dh0 = None
    if "initial_state" in names:
        dh0 = call.scratch(call.N, call.HV, call.K, call.V, dtype=torch.float32)
    call.prepare()
    found = {}
    if not others:
        call.scan_backward(grads, dv=dv, dh0=dh0)
    else:
        r, h, dh = call.tokens(), call.chunk_states(), call.chunk_states()
        call.scan_backward(grads, dv=dv, dh0=dh0, r=r, h=h, dh=dh)
        found = {
            name: torch.empty(x.shape, dtype=x.dtype, device=x.device)
            for name, x in inputs._asdict().items()
            if name in others
        }
        out = _InputGrads(*map(found.get, ("q", "k", "g", "beta")))
        call.inputs_backward(grads.output, r, dv, h, dh, out)
    if "v" in names:
        found["v"] = dv
    if "initial_state" in names:
        found["initial_state"] = reduce_state_grad(dh0, wanted.state_shape, start.indices)
    return found


def gated_delta_rule_step(inputs: DeltaInputs, pool: Pool, options: DeltaOptions) -> Tensor:
    q, k, v, g, beta = inputs
    (B, HV, V), (_, H, K) = v.shape, q.shape
    o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    tiles = choose_tiles(TILES["step", v.element_size()], v.device)
    tile = min(tiles.tile, power_of_two(V))
    launch(
        gated_delta_rule_step_kernel,
        B * HV * triton.cdiv(V, tile),
        *(q, k, v, g, beta, pool.state, pool.indices, o, options.scale, pool.state.shape[0]),
        *(q.stride(), k.stride(), v.stride(), g.stride(), beta.stride(), pool.state.stride()),
        H=H,
        HV=HV,
        K=K,
        V=V,
        NORMALISE=options.use_qk_l2norm,
        BK=power_of_two(K),
        BV=tile,
        tiles=tiles,
    )
    return o
