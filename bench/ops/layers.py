"""Random hooked layers to measure on, and the check that comes before any time is taken.

Keys, weights and Δ are random; fingerprints are random unit vectors. The keys of open tokens are
made to lie far above the threshold, and all others lie far below, so that no rounding decides a
gate.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear, normalize

from bench.harness.script import WrongResultError
from coachhook.hooks.gates import CalibratedGate, Gate, KeyedGate, Threshold
from coachhook_kernels import Delta, TokenGate, hook_linear
from coachhook_kernels.hook_linear import reference

SKETCH = 64


class Layer(NamedTuple):
    """keys `(rows, d_in)`, weight `(d_out, d_in)`; the first n_open rows of the keys are open."""

    keys: Tensor
    weight: Tensor
    delta: Delta
    gate: TokenGate
    n_open: int


def random_delta(d_in: int, d_out: int, rank: int | None, like: Tensor) -> Delta:
    """Δ of half a weight's size: dense, or with orthonormal `U` where a rank is given."""
    if rank is None:
        return Delta(like.new_empty(d_out, d_in).normal_(std=0.5 * d_in**-0.5))
    tall = torch.randn(d_out, rank, device=like.device)
    down = like.new_empty(rank, d_in).normal_(std=0.5 * (d_out / (d_in * rank)) ** 0.5)
    return Delta(down, torch.linalg.qr(tall)[0].to(like.dtype))


def random_gate(
    kind: str, d_in: int, edits: int, like: Tensor, threshold: Threshold | None = None
) -> Gate:
    """A gate that nothing opens, unless another threshold is given."""
    closed = threshold or Threshold()
    if kind == CalibratedGate.name:
        return CalibratedGate(closed).to(like.device)
    fingerprints = normalize(torch.randn(edits, SKETCH, device=like.device), dim=-1)
    return KeyedGate(
        closed,
        like.new_empty(SKETCH, d_in).normal_(std=d_in**-0.5),
        like.new_zeros(SKETCH),
        fingerprints.to(like.dtype),
        torch.arange(edits, device=like.device),
        torch.ones(edits, dtype=torch.bool, device=like.device),
    ).to(like.device)


def random_layer(
    d_in: int,
    d_out: int,
    rows: int,
    *,
    gate: str = "keyed",
    rank: int | None = None,
    edits: int = 1000,
    n_open: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Layer:
    """A hooked layer for `rows` keys; rank None: dense Δ."""
    like = torch.empty(0, dtype=dtype, device=device)
    weight = like.new_empty(d_out, d_in).normal_(std=d_in**-0.5)
    delta = random_delta(d_in, d_out, rank, like)
    keys = like.new_empty(rows, d_in).normal_()
    if gate == CalibratedGate.name:
        # ‖Δ k‖ of a random key is close to half the square root of d_out.
        made = random_gate(gate, d_in, edits, like, Threshold(alpha=d_out**0.5))
        keys[:n_open] *= 4
    else:
        # A random key's largest cosine is about 0.45; with 32 times a fingerprint added, 0.97.
        made = random_gate(gate, d_in, edits, like, Threshold(alpha=0.8))
        assert isinstance(made, KeyedGate)
        chosen = made.fingerprints[torch.arange(n_open, device=device) % edits]
        keys[:n_open] += 32 * chosen @ made.projection
    token_gate = made.per_token()
    assert token_gate is not None
    return Layer(keys, weight, delta, token_gate, n_open)


def require_close(
    name: str, found: Tensor, plain: Tensor, exact: Tensor, cut_off: float = 0.0
) -> None:
    """Raise WrongResultError unless `found` errs at most twice as much as plain torch in its dtype.

    exact: in float64. Four roundings of the largest element are allowed on top, since plain torch
    may happen to be exact, and what tensor cores `cut_off` where plain torch does not use them.
    """
    slack = 4 * torch.finfo(found.dtype).eps * float(exact.abs().max()) + cut_off
    error, allowed = (float((of.double() - exact).abs().max()) for of in (found, plain))
    if not error <= 2 * allowed + slack:
        raise WrongResultError(f"{name} is off by {error:.3g}; plain torch by {allowed:.3g}")


def require_open(name: str, layer: Layer, score: Tensor) -> None:
    """Raise WrongResultError unless exactly the first n_open rows are open."""
    is_open = layer.gate.is_open(score)
    wanted = torch.arange(len(is_open), device=is_open.device) < layer.n_open
    if not torch.equal(is_open, wanted):
        count = int(is_open.sum())
        raise WrongResultError(f"{name} opened {count} of {len(is_open)} rows, not {layer.n_open}")


def check_layer(layer: Layer) -> None:
    """Raise WrongResultError unless `hook_linear` gives the reference's output and gates."""
    keys, weight, delta, gate, _ = layer
    output, score, _ = hook_linear(keys, weight, None, delta, gate)
    require_open("hook_linear", layer, score)
    plain, plain_score, _ = reference.hook_linear(keys, weight, None, delta, gate)
    require_open("plain torch", layer, plain_score)
    wide = Delta(delta.down.double(), None if delta.up is None else delta.up.double())
    exact = linear(keys.double(), weight.double())
    first = slice(layer.n_open)
    exact[first] += wide.expand(wide.project(keys[first].double()))
    require_close("hook_linear", output, plain, exact)
