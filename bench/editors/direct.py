"""Editors that solve for new weights in closed form and put them into the model itself.

MEMIT solves each batch against ordinary text alone (`C = λ C₀ + K Kᵀ`); CoachHooK without its hook
layers also against the keys of all earlier batches; AlphaEdit moves weights in the null space of
ordinary text alone, and there against earlier keys.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

import coachhook as ch
from coachhook.update import RecursiveInverse
from editors.setting import InForce, Setting


class Rule:
    """The closed form of one layer: what a batch of keys adds.

    basis `(d_in, m)`: the directions it may use, orthonormal, or None for all. accumulate: whether
    later batches preserve the keys of earlier ones. fit: weight of a batch's own keys.
    """

    def __init__(
        self,
        inverse: RecursiveInverse,
        basis: Tensor | None = None,
        accumulate: bool = True,
        fit: float = 1.0,
    ) -> None:
        self._inverse, self._basis, self._accumulate = inverse, basis, accumulate
        self._fit = fit

    def update(self, keys: Tensor, residuals: Tensor) -> Tensor:
        """`(d_out, d_in)` for keys `(c, d_in)` and residuals `(c, d_out)`."""
        inside = keys if self._basis is None else keys @ self._basis
        solutions = self._inverse.solve(inside, fit=self._fit).float()
        if self._accumulate:
            self._inverse.absorb(inside)
        change = residuals.T @ solutions
        return change if self._basis is None else change @ self._basis.T


def memit(moment: Tensor, preservation: float, _: float) -> Rule:
    return Rule(RecursiveInverse(moment, preservation), accumulate=False)


def accumulated(moment: Tensor, preservation: float, fit: float) -> Rule:
    return Rule(RecursiveInverse(moment, preservation), fit=fit)


def alphaedit(moment: Tensor, share: float, _: float) -> Rule:
    """share: of the trace of the second moment that the directions it may use hold together.

    The published threshold on eigenvalues belongs to the scale of its models' keys; a share does
    not. Its ridge of 1 on solutions is kept in units of the mean eigenvalue.
    """
    values, vectors = torch.linalg.eigh(moment.double())
    free = values.cumsum(0) <= share * values.sum()
    basis = vectors[:, free].float()
    identity = torch.eye(basis.shape[1], dtype=torch.float64) * values.mean()
    return Rule(RecursiveInverse(identity, 1.0), basis)


class Direct:
    """Writes into the weights of the shared layers, from the lowest up, as `coachhook` does."""

    def __init__(self, setting: Setting, rules: dict[int, Rule]) -> None:
        self._setting, self._rules = setting, rules
        self._force = InForce()
        self._before = {
            layer: setting.down_projection(layer).weight.detach().clone() for layer in rules
        }
        self.edits = self

    def in_force(self) -> list[list[ch.EditRequest]]:
        return self._force.in_force()

    def edit(self, requests: Sequence[ch.EditRequest], values: Tensor) -> None:
        setting = self._setting
        contexts = setting.contexts(requests)
        for done, layer in enumerate(setting.layers):
            keys, reached = setting.read(contexts, layer)
            missing = (values - reached) / (len(setting.layers) - done)
            change = self._rules[layer].update(*setting.weighted(keys, missing))
            module = setting.down_projection(layer)
            # Conv1D keeps its weight as (d_in, d_out).
            change = change.T if isinstance(module, Conv1D) else change
            module.weight.data += change.to(module.weight)
        self._force.add(requests)

    @contextmanager
    def off(self, model: Any) -> Iterator[Any]:
        weights = {k: self._setting.down_projection(k).weight for k in self._rules}
        edited = {layer: weight.data for layer, weight in weights.items()}
        try:
            for layer, weight in weights.items():
                weight.data = self._before[layer]
            yield model
        finally:
            for layer, weight in weights.items():
                weight.data = edited[layer]

    def held(self) -> int:
        return 0
