"""Backend `torch`: chunked scans in plain PyTorch, on any device.

Within a chunk all work is matrix products; a loop over the chunks carries the state. The backward is written by hand:
it keeps only the inputs, recomputes the states at chunk boundaries, and computes only what the requested gradients
need. In the formulas C is the chunk length, S the state at the start of the chunk, S' the state at its end.
"""

import functools

import torch
from torch import Tensor

from s0kernels.backends.chunks import (
    Chunks,
    decay_matrix,
    decay_matrix_grad,
    lower_product,
    reverse_cumsum,
    unit_lower_inverse,
    upper_product,
)
from s0kernels.backends.shared import (
    AMPLIFIES,
    dt_grad,
    gather_states,
    process_dt,
    reduce_state_grad,
    silu_slope,
    store_states,
)
from s0kernels.calls import Call, DeltaInputs, DeltaOptions, Grads, Pool, SSDInputs, SSDOptions, Start, Wanted


def supports(call: Call) -> str | None:
    return None


# Gated delta rule
#
# With G_i = exp(g_1 + .. + g_i), D_ij = exp(g_{j+1} + .. + g_i), and E_i = exp(g_{i+1} + .. + g_C) inside a chunk:
#   A     = strict_lower(diag(beta) (K K^T * D)),  W = (I + A)^-1,  P = lower(scale Q K^T * D)
#   delta = W diag(beta) (V - diag(G) K S)          the value that each token writes
#   O     = scale diag(G) Q S + P delta
#   S'    = G_C S + K^T diag(E) delta

_GDN_CHUNK = 32


class _DeltaChunks:
    """The inputs of the gated delta rule by chunk, and the terms that depend on k, g and beta alone."""

    def __init__(self, chunks: Chunks, inputs: DeltaInputs, options: DeltaOptions):
        dtype, heads = chunks.dtype, inputs.g.shape[2]
        self.q, self.k = chunks.split(inputs.q, dtype, heads), chunks.split(inputs.k, dtype, heads)
        self.beta = chunks.split(inputs.beta, dtype)[..., None]
        self.scale = options.scale
        self.q_norm = self.k_norm = None
        if options.use_qk_l2norm:
            self.q, self.q_norm = _normalise(self.q)
            self.k, self.k_norm = _normalise(self.k)
        g = chunks.split(inputs.g, dtype)
        self.from_start = g.cumsum(-1).exp()[..., None]
        self.decay = decay_matrix(g)
        self.to_end = self.decay[..., -1, :, None]
        self.last = self.from_start[..., -1:, :]
        self.attention = (self.q @ self.k.mT).mul_(self.decay).mul_(self.scale).tril_()
        self.similarity = (self.k @ self.k.mT).mul_(self.decay).tril_(-1)
        self.inverse = unit_lower_inverse((self.beta * self.similarity).tril_(-1))
        if dtype == torch.float32 and self.inverse.device.type in ("cpu", "cuda"):
            self._refine_inverses()

    def _refine_inverses(self) -> None:
        """Recompute K K^T and W in fp64 for chunks where W amplifies rounding. Selecting them on a GPU would
        synchronise, so a GPU recomputes all chunks. Some devices lack fp64."""
        at = slice(None)
        if self.inverse.device.type == "cpu":
            at = torch.linalg.vector_norm(self.inverse, dim=-1).amax(-1) > AMPLIFIES**0.5
            if not at.any():
                return
        keys = self.k[at].double()
        similarity = (keys @ keys.mT).mul_(self.decay[at]).tril_(-1)
        self.inverse[at] = unit_lower_inverse(self.beta[at] * similarity).to(self.inverse.dtype)
        self.similarity[at] = similarity.to(self.similarity.dtype)

    def write(self, at: slice, values: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Return (V - diag(G) K S, delta) for the chunks `at`."""
        error = values - self.from_start[at] * (self.k[at] @ state)
        return error, lower_product(self.inverse[at], self.beta[at] * error)

    def advance(self, at: slice, state: Tensor, delta: Tensor) -> None:
        """Advance S to S', in place."""
        state.mul_(self.last[at]).add_((self.k[at] * self.to_end[at]).mT @ delta)


def _normalise(x: Tensor) -> tuple[Tensor, Tensor]:
    norm = torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)
    return x * norm, norm


def _normalise_grad(dx: Tensor, x: Tensor, norm: Tensor | None) -> Tensor:
    """Propagate a gradient through x -> x * norm, given the normalised x."""
    return dx if norm is None else norm * (dx - x * (x * dx).sum(-1, keepdim=True))


def gated_delta_rule_forward(
    inputs: DeltaInputs, start: Start, options: DeltaOptions, output_final_state: bool
) -> tuple[Tensor, Tensor]:
    chunks = Chunks(inputs.q, start.cu_seqlens, options.chunk_size or _GDN_CHUNK)
    parts = _DeltaChunks(chunks, inputs, options)
    values = chunks.split(inputs.v, chunks.dtype)
    states = _delta_states(chunks, inputs, start)
    output = torch.empty_like(values)
    for at in chunks.steps:
        state = states[: at.stop - at.start]
        _, delta = parts.write(at, values[at], state)
        read = parts.scale * parts.from_start[at] * (parts.q[at] @ state)
        output[at] = read + lower_product(parts.attention[at], delta)
        parts.advance(at, state, delta)
    final = chunks.unsort(states) if output_final_state else states.new_empty(0, *states.shape[1:])
    return chunks.join(output, inputs.v.dtype), final


def _delta_states(chunks: Chunks, inputs: DeltaInputs, start: Start) -> Tensor:
    return chunks.starting_states(start, (inputs.v.shape[2], inputs.q.shape[3], inputs.v.shape[3]))


def gated_delta_rule_backward(
    grads: Grads, inputs: DeltaInputs, start: Start, options: DeltaOptions, wanted: Wanted
) -> dict[str, Tensor]:
    """Let dvalue = W^T (P^T dO + diag(E) K dS') be the gradient of the argument of W. Then dS = scale Q^T diag(G) dO +
    G_C dS' - K^T diag(G beta) dvalue, which needs neither v nor S; dV = diag(beta) dvalue.
    """
    chunks = Chunks(inputs.q, start.cu_seqlens, options.chunk_size or _GDN_CHUNK)
    parts = _DeltaChunks(chunks, inputs, options)
    doutput = grads.output
    if doutput is None:
        assert grads.final_state is not None
        doutput = inputs.q.new_zeros(*inputs.g.shape, grads.final_state.shape[-1])
    dout = chunks.split(doutput, chunks.dtype)
    shape = (chunks.sequences, inputs.g.shape[2], inputs.q.shape[3], dout.shape[3])
    dstate = dout.new_zeros(shape) if grads.final_state is None else chunks.sort(grads.final_state)
    others = wanted.names & {"q", "k", "g", "beta"}
    dstates = dstate.new_empty(chunks.count if others else 0, *shape[1:])  # dS' of every chunk
    dvalues = torch.empty_like(dout if wanted.names - {"initial_state"} else dout[:0])
    through_output = upper_product(parts.attention.mT, dout)
    for at in reversed(chunks.steps):
        grad = dstate[: at.stop - at.start]
        dvalue = through_output[at] + parts.to_end[at] * (parts.k[at] @ grad)
        dvalue = upper_product(parts.inverse[at].mT, dvalue)
        if others:
            dstates[at] = grad
        if dvalues.numel():
            dvalues[at] = dvalue
        grad.mul_(parts.last[at])
        grad.add_((parts.scale * parts.from_start[at] * parts.q[at]).mT @ dout[at])
        grad.sub_((parts.from_start[at] * parts.beta[at] * parts.k[at]).mT @ dvalue)
    found = {}
    if others:
        states = _delta_states(chunks, inputs, start)
        values = chunks.split(inputs.v, chunks.dtype)
        found = _delta_input_grads(chunks, parts, (dout, dvalues, dstates), values, states)
        for name, norm in (("q", parts.q_norm), ("k", parts.k_norm)):
            dx = _normalise_grad(found[name], getattr(parts, name), norm)
            found[name] = chunks.join(dx, chunks.dtype, inputs.q.shape[2])
    if "v" in wanted.names:
        found["v"] = chunks.join(parts.beta * dvalues, chunks.dtype)
    if "initial_state" in wanted.names:
        found["initial_state"] = reduce_state_grad(chunks.unsort(dstate), wanted.state_shape, start.indices)
    return found


def _delta_input_grads(chunks: Chunks, inputs: _DeltaChunks, grads, values, states) -> dict[str, Tensor]:
    """Return dq and dk (by chunk, for the normalised q and k), dg and dbeta. The states and delta are recomputed first.
    `grads` are dO, dvalue and dS' of every chunk."""
    dout, dvalue, dstates = grads
    at_start, error, delta = torch.empty_like(dstates), torch.empty_like(values), torch.empty_like(values)
    for at in chunks.steps:
        state = states[: at.stop - at.start]
        at_start[at] = state
        error[at], delta[at] = inputs.write(at, values[at], state)
        inputs.advance(at, state, delta[at])

    dsimilarity = -(dvalue @ delta.mT).tril_(-1)  # d(A)
    dattention = (dout @ delta.mT).tril_()
    dbeta = (dvalue * error).sum(-1) + (dsimilarity * inputs.similarity).sum(-1)
    pairs = dattention * inputs.attention + inputs.beta * dsimilarity * inputs.similarity

    dattention = dattention.mul_(inputs.decay).mul_(inputs.scale)
    dsimilarity = dsimilarity.mul_(inputs.decay).mul_(inputs.beta)
    dq_start = inputs.scale * inputs.from_start * (dout @ at_start.mT)
    dk_start = -inputs.from_start * inputs.beta * (dvalue @ at_start.mT)
    dk_end = inputs.to_end * (delta @ dstates.mT)
    dq = lower_product(dattention, inputs.k) + dq_start
    dk = upper_product(dattention.mT, inputs.q) + (dsimilarity + dsimilarity.mT) @ inputs.k + dk_start + dk_end

    through_start = (dq_start * inputs.q).sum(-1) + (dk_start * inputs.k).sum(-1)
    through_end = (dk_end * inputs.k).sum(-1)
    carried = inputs.last[..., 0] * (at_start * dstates).sum((-1, -2))[..., None]
    dg = decay_matrix_grad(pairs) + reverse_cumsum(through_start) + _before(through_end) + carried
    return {"q": dq, "k": dk, "g": chunks.join(dg, chunks.dtype), "beta": chunks.join(dbeta, chunks.dtype)}


def _before(x: Tensor) -> Tensor:
    """Return the sums over earlier positions only."""
    return torch.nn.functional.pad(x[..., :-1].cumsum(-1), (1, 0))


def gated_delta_rule_step(inputs: DeltaInputs, pool: Pool, options: DeltaOptions) -> Tensor:
    state, (q, k, v, g, beta) = pool.state, inputs
    dtype, heads = state.dtype, v.shape[1]
    q, k = q.to(dtype), k.to(dtype)
    if options.use_qk_l2norm:
        q, k = _normalise(q)[0], _normalise(k)[0]
    q, k = _repeat_heads(q, heads)[:, :, None], _repeat_heads(k, heads)[:, :, None]
    rows = gather_states(state, pool.indices, (q.shape[0], *state.shape[1:]), state)
    rows = rows * g.to(dtype).exp()[..., None, None]
    write = beta.to(dtype)[..., None, None] * (v.to(dtype)[:, :, None] - k @ rows)
    rows = torch.addcmul(rows, k.mT, write)
    store_states(state, pool.indices, rows)
    return (options.scale * (q @ rows)).squeeze(2).to(v.dtype)


def _repeat_heads(x: Tensor, heads: int) -> Tensor:
    """Repeat heads from [B, G, ...] to [B, heads, ...]."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


# Mamba-2 SSD
#
# With a = dt A, G_i = exp(a_1 + .. + a_i), D_ij = exp(a_{j+1} + .. + a_i), E_i = exp(a_{i+1} + .. + a_C), X = dt x:
#   M  = lower(C B^T * D)
#   Y  = diag(G) C S^T + M X
#   S' = G_C S + X^T diag(E) B
# The R = H / G heads of a group share B and C. Head-major tensors are [NC, G, R, C, ...]; for products with B and C the
# heads of a group lie side by side, [NC, G, C, R * P], which is also how a state reads as a matrix, [G, R * P, N].

_SSD_CHUNK = 64


class _SSDChunks:
    """dt, A and C by chunk. The gradient of the initial state needs nothing else."""

    def __init__(self, chunks: Chunks, inputs: SSDInputs, options: SSDOptions):
        groups = inputs.C.shape[2]
        self.dt = chunks.split(process_dt(inputs, options), chunks.dtype).unflatten(1, (groups, -1))[..., None]
        self.rate = inputs.A.to(chunks.dtype).view(groups, -1, 1)
        self.log_decay = self.dt[..., 0] * self.rate
        self.from_start = self.log_decay.cumsum(-1).exp()[..., None]
        self.C = chunks.split(inputs.C, chunks.dtype)
        self.last = self.from_start[..., -1:, :].flatten(1, 2)  # [NC, H, 1, 1], against states [., H, P, N]

    def split_heads(self, chunks: Chunks, x: Tensor) -> Tensor:
        """Cut [B, T, H, P] into [NC, G, R, C, P]."""
        return chunks.split(x, chunks.dtype).unflatten(1, (self.C.shape[1], -1))

    def add_pairs(self, chunks: Chunks, x: Tensor, B: Tensor) -> None:
        """Add the terms that the output and the other gradients need."""
        self.B = chunks.split(B, chunks.dtype)
        self.x = self.split_heads(chunks, x)
        self.scaled = self.dt * self.x
        self.decay = decay_matrix(self.log_decay)
        self.to_end = self.decay[..., -1, :, None]
        self.mixing = (self.C @ self.B.mT).tril_()[:, :, None] * self.decay

    def read(self, at: slice, state: Tensor) -> Tensor:
        """Return diag(G) C S^T for the chunks `at`, [., G, R, C, P]."""
        groups, heads = self.x.shape[1:3]
        return self.from_start[at] * _head_major(self.C[at] @ _as_matrix(state, groups).mT, heads)

    def advance(self, at: slice, state: Tensor) -> None:
        """Advance S to S', in place."""
        write = _side_by_side(self.to_end[at] * self.scaled[at]).mT @ self.B[at]
        state.mul_(self.last[at]).add_(write.view_as(state))


def _side_by_side(x: Tensor) -> Tensor:
    """Reshape [., G, R, C, P] to [., G, C, R * P]."""
    return x.transpose(2, 3).flatten(3)


def _head_major(x: Tensor, heads: int) -> Tensor:
    """Reshape [., G, C, R * P] to [., G, R, C, P]."""
    return x.unflatten(3, (heads, -1)).transpose(2, 3)


def _as_matrix(states: Tensor, groups: int) -> Tensor:
    """Reshape [., H, P, N] to [., G, R * P, N]."""
    return states.unflatten(1, (groups, -1)).flatten(2, 3)


def _ssd_states(chunks: Chunks, inputs: SSDInputs, start: Start) -> Tensor:
    return chunks.starting_states(start, (*inputs.x.shape[2:], inputs.B.shape[3]))


def _ssd_scan(chunks: Chunks, inputs: _SSDChunks, states: Tensor) -> Tensor:
    """Return Y [NC, G, R, C, P] without D and z. Afterwards `states` hold the final states."""
    output = torch.empty_like(inputs.x)
    for at in chunks.steps:
        state = states[: at.stop - at.start]
        output[at] = inputs.read(at, state) + lower_product(inputs.mixing[at], inputs.scaled[at])
        inputs.advance(at, state)
    return output


def ssd_forward(
    inputs: SSDInputs, start: Start, options: SSDOptions, output_final_state: bool
) -> tuple[Tensor, Tensor]:
    x, D, z = inputs.x, inputs.D, inputs.z
    chunks = Chunks(x, start.cu_seqlens, options.chunk_size or _SSD_CHUNK)
    parts = _SSDChunks(chunks, inputs, options)
    parts.add_pairs(chunks, x, inputs.B)
    states = _ssd_states(chunks, inputs, start)
    output = _ssd_scan(chunks, parts, states).flatten(1, 2)
    if D is not None:
        output.addcmul_(parts.x.flatten(1, 2), D.to(chunks.dtype)[:, None, None])
    if z is not None:
        output.mul_(torch.nn.functional.silu(chunks.split(z, chunks.dtype)))
    final = chunks.unsort(states) if output_final_state else states.new_empty(0, *states.shape[1:])
    return chunks.join(output, x.dtype), final


def ssd_backward(
    grads: Grads, inputs: SSDInputs, start: Start, options: SSDOptions, wanted: Wanted
) -> dict[str, Tensor]:
    """dS = G_C dS' + dY^T diag(G) C, which needs neither x, B nor S; dY = dO silu(z)."""
    x, C, D, z = inputs.x, inputs.C, inputs.D, inputs.z
    chunks = Chunks(C, start.cu_seqlens, options.chunk_size or _SSD_CHUNK)
    parts, names = _SSDChunks(chunks, inputs, options), wanted.names
    doutput = grads.output
    if doutput is None:
        assert grads.final_state is not None
        doutput = C.new_zeros(*inputs.dt.shape, grads.final_state.shape[2])
    doutput = doutput.to(chunks.dtype)
    dy = doutput if z is None else doutput * torch.nn.functional.silu(z.to(chunks.dtype))
    found, scanned = {}, names - {"initial_state", "D"}
    if "D" in names:
        found["D"] = (dy * x).sum((0, 1, 3))
    if names == {"D"}:
        return found
    dout = parts.split_heads(chunks, dy)
    shape = (chunks.sequences, inputs.dt.shape[2], dout.shape[-1], C.shape[3])
    dstate = dout.new_zeros(shape) if grads.final_state is None else chunks.sort(grads.final_state)
    dstates = dstate.new_empty(chunks.count if scanned else 0, *shape[1:])  # dS' of every chunk
    for at in reversed(chunks.steps):
        grad = dstate[: at.stop - at.start]
        if scanned:
            dstates[at] = grad
        read = _side_by_side(parts.from_start[at] * dout[at]).mT @ parts.C[at]
        grad.mul_(parts.last[at]).add_(read.view_as(grad))
    if scanned:
        parts.add_pairs(chunks, x, inputs.B)
        states = _ssd_states(chunks, inputs, start)
        found |= _SSDGrads(parts, dout, dstates, states, chunks.steps).wanted(chunks, names)
    skip = 0.0 if D is None else D.to(chunks.dtype)[:, None]
    if "x" in names:
        found["x"] = found["x"] + skip * dy
    if z is not None and "z" in names:
        found["z"] = doutput * (found.pop("y") + skip * x) * silu_slope(z.to(chunks.dtype))
    if "dt" in found:
        found["dt"] = dt_grad(found["dt"], inputs, options)
    if "dt_bias" in names:
        found["dt_bias"] = found["dt"].sum((0, 1))
    if "initial_state" in names:
        found["initial_state"] = reduce_state_grad(chunks.unsort(dstate), wanted.state_shape, start.indices)
    return found


class _SSDGrads:
    """The gradients of the inputs by chunk. Terms that several gradients share are computed on first use; the states
    are computed at once. `dstates` is dS' of every chunk."""

    def __init__(self, inputs: _SSDChunks, dout: Tensor, dstates: Tensor, states: Tensor, steps: list[slice]):
        self.inputs, self.dout, self.dstates = inputs, dout, dstates
        self.groups, self.heads = inputs.x.shape[1:3]
        self.at_start = torch.empty_like(dstates)
        for at in steps:
            state = states[: at.stop - at.start]
            self.at_start[at] = state
            inputs.advance(at, state)

    def wanted(self, chunks: Chunks, names: frozenset[str]) -> dict[str, Tensor]:
        """Return the gradients in `names` among dx, ddt (of the processed dt), dA, dB, dC, and y (for dz)."""
        inputs, found = self.inputs, {}
        if "z" in names:
            y = self.read + lower_product(inputs.mixing, inputs.scaled)
            found["y"] = chunks.join(y.flatten(1, 2), chunks.dtype)
        if "C" in names:
            dread = _side_by_side(inputs.from_start * self.dout) @ _as_matrix(self.at_start, self.groups)
            found["C"] = chunks.join(lower_product(self.dproduct, inputs.B) + dread, chunks.dtype)
        if "B" in names:
            dwrite = _side_by_side(inputs.to_end * inputs.scaled) @ _as_matrix(self.dstates, self.groups)
            found["B"] = chunks.join(upper_product(self.dproduct.mT, inputs.C) + dwrite, chunks.dtype)
        if "x" in names:
            found["x"] = chunks.join((inputs.dt * self.dscaled).flatten(1, 2), chunks.dtype)
        if names & {"dt", "dt_bias"}:
            ddt = inputs.rate * self.dlog + (inputs.x * self.dscaled).sum(-1)
            found["dt"] = chunks.join(ddt.flatten(1, 2), chunks.dtype)
        if "A" in names:
            found["A"] = (inputs.dt[..., 0] * self.dlog).sum((0, 3)).flatten()
        return found

    @functools.cached_property
    def read(self) -> Tensor:
        return self.inputs.read(slice(None), self.at_start)

    @functools.cached_property
    def dmixing(self) -> Tensor:
        return (self.dout @ self.inputs.scaled.mT).tril_()

    @functools.cached_property
    def dproduct(self) -> Tensor:
        """d(C B^T), summed over the heads of the group."""
        return (self.dmixing * self.inputs.decay).sum(2)

    @functools.cached_property
    def from_end(self) -> Tensor:
        write = self.inputs.B @ _as_matrix(self.dstates, self.groups).mT
        return self.inputs.to_end * _head_major(write, self.heads)

    @functools.cached_property
    def dscaled(self) -> Tensor:
        return upper_product(self.inputs.mixing.mT, self.dout) + self.from_end

    @functools.cached_property
    def dlog(self) -> Tensor:
        """d(dt A)."""
        inputs = self.inputs
        carried = inputs.last[..., 0, 0] * (self.at_start * self.dstates).sum((-1, -2))
        dlog = decay_matrix_grad(self.dmixing * inputs.mixing)
        dlog = dlog + carried.unflatten(1, (self.groups, self.heads))[..., None]
        through_start, through_end = (self.dout * self.read).sum(-1), (inputs.scaled * self.from_end).sum(-1)
        return dlog + reverse_cumsum(through_start) + _before(through_end)


def ssd_step(inputs: SSDInputs, pool: Pool, options: SSDOptions) -> Tensor:
    x, D, z, state = inputs.x, inputs.D, inputs.z, pool.state
    dtype = state.dtype
    steps = process_dt(inputs, options)
    B, C = (_repeat_heads(t.to(dtype), x.shape[1]) for t in (inputs.B, inputs.C))
    rows = gather_states(state, pool.indices, (x.shape[0], *state.shape[1:]), state)
    rows = rows * (steps * inputs.A.to(dtype)).exp()[..., None, None]
    rows = torch.addcmul(rows, (steps[..., None] * x.to(dtype))[..., None], B[:, :, None])
    output = (rows @ C[..., None]).squeeze(-1)
    store_states(state, pool.indices, rows)
    if D is not None:
        output = output + D.to(dtype)[:, None] * x
    if z is not None:
        output = output * torch.nn.functional.silu(z.to(dtype))
    return output.to(x.dtype)
