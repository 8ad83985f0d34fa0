"""The gated delta rule: which kernels run, with which sizes, on which memory."""

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


class _Call:
    """The sizes of one call, and the launches that forward and backward share."""

    def __init__(self, q, k, g, beta, V, cu_seqlens, scale, use_qk_l2norm, chunk_size):
        self.q, self.k, self.g, self.beta, self.cu_seqlens = q, k, g, beta, cu_seqlens
        self.scale, self.normalise = scale, use_qk_l2norm
        self.B, self.T, self.H, self.K = q.shape
        self.HV, self.V = g.shape[2], V
        self.N = self.B if cu_seqlens is None else cu_seqlens.shape[0] - 1
        if self.N == 0 and self.T * self.B > 0:
            raise ValueError(f"cu_seqlens must start at 0 and end at T = {self.T}, got no sequences")
        self.bytes = q.element_size()
        longest = 64 if self.bytes == 2 else 32
        self.BT = min(longest, power_of_two(chunk_size or longest))
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

    def scan(self, v, initial_state, state_indices, *, o=None, r=None, h=None, ht=None) -> None:
        launch(
            gated_delta_rule_scan_fwd_kernel,
            self.walks,
            *(self.q, self.k, v, self.w, self.p, self.gates, initial_state, state_indices, self.cu_seqlens),
            *(o, r, h, ht, self.T, self.N, bank_size(initial_state)),
            *(self.q.stride(), self.k.stride(), v.stride(), state_strides(initial_state)),
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

    def scan_backward(
        self, do, dht, *, dv, dh0, v=None, initial_state=None, state_indices=None, r=None, h=None, dh=None
    ) -> None:
        launch(
            gated_delta_rule_scan_bwd_kernel,
            self.walks if v is None else 2 * self.walks,
            *(self.q, self.k, v, self.w, self.p, self.gates, initial_state, state_indices, self.cu_seqlens),
            *(do, dht, r, dv, h, dh, dh0, self.T, self.N, bank_size(initial_state), self.walks),
            *(self.q.stride(), self.k.stride(), strides(v, 4), state_strides(initial_state)),
            *(strides(do, 4), strides(dht, 4)),
            **self.sizes,
            V=self.V,
            BV=self.tile,
            **self.blocks,
            tiles=self.tiles("scan"),
        )

    def inputs_backward(self, do, r, dv, h, dh, *, dq, dk, dg, dbeta) -> None:
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
            *(dq, dk, pg, pbeta, dg, dbeta, self.T, self.N, self.HV // self.H, self.V),
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
    q, k, v, g, beta, initial_state, state_indices, cu_seqlens, *, scale, use_qk_l2norm, output_final_state, chunk_size
) -> tuple[Tensor, Tensor]:
    call = _Call(q, k, g, beta, v.shape[3], cu_seqlens, scale, use_qk_l2norm, chunk_size)
    o = call.tokens()
    shape = (call.N if output_final_state else 0, call.HV, call.K, call.V)
    final = call.scratch(*shape, dtype=torch.float32)
    ht = final if output_final_state else None
    call.prepare()
    if call.split:
        r, h = call.tokens(), call.chunk_states()
        call.scan(v, initial_state, state_indices, r=r, h=h, ht=ht)
        call.output(r, h, o)
    else:
        call.scan(v, initial_state, state_indices, o=o, ht=ht)
    return o, final


def gated_delta_rule_backward(
    doutput,
    dfinal,
    q,
    k,
    v,
    g,
    beta,
    initial_state,
    state_indices,
    cu_seqlens,
    *,
    state_shape,
    scale,
    use_qk_l2norm,
    chunk_size,
    wanted,
) -> dict[str, Tensor]:
    V = doutput.shape[3] if doutput is not None else dfinal.shape[3]
    call = _Call(q, k, g, beta, V, cu_seqlens, scale, use_qk_l2norm, chunk_size)
    if doutput is not None:
        doutput = doutput.to(q.dtype)
    others = wanted & {"q", "k", "g", "beta"}
    dv = call.tokens() if others or "v" in wanted else None
    dh0 = None
    if "initial_state" in wanted:
        dh0 = call.scratch(call.N, call.HV, call.K, call.V, dtype=torch.float32)
    call.prepare()
    grads = {}
    if not others:
        call.scan_backward(doutput, dfinal, dv=dv, dh0=dh0)
    else:
        r, h, dh = call.tokens(), call.chunk_states(), call.chunk_states()
        states = {"v": v, "initial_state": initial_state, "state_indices": state_indices, "r": r, "h": h, "dh": dh}
        call.scan_backward(doutput, dfinal, dv=dv, dh0=dh0, **states)
        inputs = {"q": q, "k": k, "g": g, "beta": beta}
        grads = {n: torch.empty(x.shape, dtype=x.dtype, device=x.device) for n, x in inputs.items() if n in wanted}
        call.inputs_backward(doutput, r, dv, h, dh, **{f"d{name}": grads.get(name) for name in inputs})
    if "v" in wanted:
        grads["v"] = dv
    if "initial_state" in wanted:
        grads["initial_state"] = reduce_state_grad(dh0, state_shape, state_indices)
    return grads


def gated_delta_rule_step(q, k, v, g, beta, state, *, scale, use_qk_l2norm, state_indices) -> Tensor:
    (B, HV, V), (_, H, K) = v.shape, q.shape
    o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    tiles = choose_tiles(TILES["step", v.element_size()], v.device)
    tile = min(tiles.tile, power_of_two(V))
    launch(
        gated_delta_rule_step_kernel,
        B * HV * triton.cdiv(V, tile),
        *(q, k, v, g, beta, state, state_indices, o, scale, state.shape[0]),
        *(q.stride(), k.stride(), v.stride(), g.stride(), beta.stride(), state.stride()),
        H=H,
        HV=HV,
        K=K,
        V=V,
        NORMALISE=use_qk_l2norm,
        BK=power_of_two(K),
        BV=tile,
        tiles=tiles,
    )
    return o
