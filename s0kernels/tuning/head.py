"""The language-model head and its cross-entropy. Logits are computed for predicted tokens only, in chunks.

The logits of a whole batch are the largest tensors of a training run: [tokens, 248320] for Qwen3.5, in the model's
dtype, in fp32, and a gradient of each. Here the head reads one contiguous matrix [tokens, hidden] in chunks. The
gradient of a chunk is computed while its logits exist, so the backward starts from a matrix [tokens, hidden] as well.

The functions of libraries do not fit. `torch.nn.functional.linear_cross_entropy` (2.13) computes the logits twice if
every token has its own weight. Like cut-cross-entropy and liger-kernel, which are GPU kernels, it takes a weight
matrix. A head here may be any module, followed by a factor.
"""

import contextlib
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from s0kernels.modules.swap import find_site

#: bytes of the logits of one chunk; their gradient takes as much again
CHUNK_BYTES = 2**27
#: number of logits whose exponentials a CPU computes at a time, in fp32, so that they stay in its cache
_PIECE = 2**21


class Head:
    """The computation between the last hidden states and the logits: a module, then a factor or a soft cap.

    It is compared once with the model's own logits, on the first tokens of `ids` [1, T]. `known` says whether they
    agree. If they do not, `read` returns the model's own logits, and the other methods work on those.
    """

    def __init__(self, model: Any, ids: Tensor):
        self._model = model
        config = model.config.get_text_config()
        self._vocabulary = config.vocab_size
        self._after = _arithmetic(config)
        #: the candidate for the head, and the head if it was confirmed
        self._module = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        self._known = self._module if self._module is not None and self._agrees(self._module, ids[:, :8]) else None

    @property
    def known(self) -> bool:
        return self._known is not None

    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits [tokens, vocabulary] for the result of `read` as a matrix [tokens, ...]."""
        return hidden if self._known is None else self._after(self._known(hidden))

    def read(self, **inputs) -> Tensor:
        """Run the model, and return the input of its head [B, T, hidden]; or its logits [B, T, vocabulary] if the head
        is not known."""
        if self._known is None:
            with _Tap(self._module, Tensor.contiguous):
                return self._model(**inputs, use_cache=False).logits
        few = 0 if type(self._known) is nn.Linear else 1  # other modules may not accept a matrix without rows
        with _Tap(self._known, lambda hidden: hidden[:1, :few]) as tap:
            self._model(**inputs, use_cache=False)
        assert tap.taken is not None  # a known head is called by the model
        return tap.taken

    @property
    def chunk(self) -> int:
        """The number of tokens in a chunk, which depends on the size of the vocabulary."""
        rows = max(CHUNK_BYTES // (self._vocabulary * self._model.dtype.itemsize), 1)
        return 1 << (rows.bit_length() - 1)

    @torch.no_grad()
    def _agrees(self, module: nn.Module, ids: Tensor) -> bool:
        """Compare logits for hidden states as they are and for larger ones, which reveal a soft cap."""

        def probe(hidden: Tensor) -> Tensor:
            return torch.cat([hidden[:1, -2:] * size for size in (1, 8, 64)], 1).contiguous()

        site = find_site(self._model)
        with _Tap(module, probe) as tap, contextlib.nullcontext() if site is None else site.override(None):
            theirs = self._model(input_ids=ids, use_cache=False).logits
        if tap.taken is None:  # the model uses the head's weight without calling the head
            return False
        ours = self._after(module(probe(tap.taken)[0])).to(theirs.device)
        if ours.shape != theirs.shape[1:] or not theirs.any():
            return False
        ours = ours.to(theirs.dtype)  # some models return logits in fp32, and the losses are computed in fp32
        allowed = 16 * torch.finfo(theirs.dtype).eps * theirs[0].abs().amax(1, keepdim=True)
        return bool(((ours - theirs[0]).abs() <= allowed).all())


class _Tap:
    """Context manager that keeps the input of the head and passes the head something else instead. Other threads may
    use the model meanwhile."""

    def __init__(self, module: nn.Module | None, instead: Callable[[Tensor], Tensor]):
        self._module, self._instead = module, instead
        self.taken: Tensor | None = None

    def __enter__(self) -> "_Tap":
        self._thread = threading.get_ident()
        self._handle = None if self._module is None else self._module.register_forward_pre_hook(self._take)
        return self

    def __exit__(self, *_) -> None:
        if self._handle is not None:
            self._handle.remove()

    def _take(self, module: nn.Module, args: tuple) -> tuple | None:
        if threading.get_ident() != self._thread:
            return None
        self.taken = args[0]
        return (self._instead(args[0]), *args[1:])


def _arithmetic(config) -> Callable[[Tensor], Tensor]:
    """Return the function that a model applies to the output of its head, according to its config."""
    factor, divisor, cap = (
        getattr(config, name, None) for name in ("lm_head_multiplier", "logits_scaling", "final_logit_softcapping")
    )

    def after(logits: Tensor) -> Tensor:
        if factor not in (None, 1):
            logits = logits * factor
        if divisor not in (None, 1):
            logits = logits / divisor
        return logits if cap is None else torch.tanh(logits / cap) * cap

    return after


def cross_entropy(head: Head, hidden: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy of each token, [tokens] in fp32. `hidden` is the result of `head.read` as a matrix
    [tokens, ...]; `targets` is [tokens].

    Each loss depends on one row. So the gradient of the rows is computed in the forward for weight 1, and scaled in the
    backward. The weights of the head get no gradient.
    """
    return _CrossEntropy.apply(hidden.contiguous(), head, targets.to(hidden.device))


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, head: Head, targets: Tensor) -> Tensor:
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        losses = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        for start in range(0, len(targets), head.chunk):
            rows = slice(start, start + head.chunk)
            with torch.set_grad_enabled(gradient is not None):
                part = hidden[rows].detach().requires_grad_(gradient is not None)
                logits = head.logits(part)
            if not logits.requires_grad:  # the head cuts the graph: the caller reports the missing gradient
                gradient = None
            losses[rows], slope = _losses(logits.detach(), targets[rows].to(logits.device), gradient is not None)
            if gradient is not None:
                gradient[rows] = torch.autograd.grad(logits, part, slope)[0]
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple:
        (gradient,), (grad,) = ctx.saved_tensors, grads
        return None if gradient is None else (gradient * grad[:, None]).to(gradient.dtype), None, None


def _losses(logits: Tensor, targets: Tensor, wanted: bool) -> tuple[Tensor, Tensor | None]:
    """Return the losses, [tokens] in fp32, and their gradient, [tokens, vocabulary] in the logits' dtype or None."""
    tokens, vocabulary = logits.shape
    size = max(_PIECE // vocabulary, 1) if logits.device.type == "cpu" else tokens
    slope = torch.empty_like(logits) if wanted else None
    losses = []
    for start in range(0, tokens, size):
        rows = slice(start, start + size)
        kept = torch.log_softmax(logits[rows], 1, dtype=torch.float32)
        place = targets[rows, None]
        losses.append(-kept.gather(1, place)[:, 0])
        if slope is not None:
            kept = kept.exp_()
            kept.scatter_add_(1, place, kept.new_full(place.shape, -1.0))
            slope[rows] = kept
    return torch.cat(losses), slope
