"""Editors that solve for new weights in closed form and put them into the model itself.

MEMIT preserves only ordinary text when it solves a batch (`C = λ C₀ + K Kᵀ`). CoachHooK without
hook layers also preserves the keys of all earlier batches. AlphaEdit moves weights only within the
null space of ordinary text, where it preserves the keys of earlier batches.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

import coachhook as ch
from bench.comparison.editors.setting import InForce, Setting
from coachhook.editing.inverse import RecursiveInverse
from coachhook.errors import ConfigError


class Rule:
    """The closed form of one layer's change by a batch.

    basis `(d_in, m)`: orthonormal directions that it may use, or None for all. accumulate: whether
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
        """The change of weights `(d_out, d_in)` for keys `(c, d_in)`, residuals `(c, d_out)`."""
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


def alphaedit(moment: Tensor, threshold: float, _: float) -> Rule:
    """threshold: the rule may use directions whose eigenvalue of the second moment is at most this
    multiple of the median one.

    The published threshold and ridge fit the scale of the published models' keys. The median
    ignores the few directions of attention sinks, which hold most of the trace. The ridge is a
    tenth of an ordinary key's mean squared norm in the free directions, so that 10/11 of a lone
    key's residual is met.
    """
    values, vectors = torch.linalg.eigh(moment.double())
    free = values <= threshold * values.median()
    if not free.any():
        raise ConfigError(
            f"alphaedit@{threshold:g} leaves no direction: no eigenvalue of ordinary keys' second "
            "moment is below so many median ones; give it a larger number"
        )
    basis = vectors[:, free].float()
    ridge = torch.eye(basis.shape[1], dtype=torch.float64) * values[free].sum() / 10
    return Rule(RecursiveInverse(ridge, 1.0), basis)


class Direct:
    """Writes into the weights of the shared layers, from the lowest up, as `coachhook` does.

    averaged: one key for each fact, the mean over its contexts, as in MEMIT and AlphaEdit;
    otherwise one key for each context, as in the engine.
    """

    def __init__(self, setting: Setting, rules: dict[int, Rule], averaged: bool) -> None:
        self._setting, self._rules, self._averaged = setting, rules, averaged
        self._force = InForce()
        self._before = {
            layer: setting.down_projection(layer).weight.detach().clone() for layer in rules
        }
        self.edits = self

    def in_force(self) -> list[list[ch.EditRequest]]:
        return self._force.in_force()

    def edit(self, requests: Sequence[ch.EditRequest], values: Tensor) -> None:
        setting = self._setting
        requests, values = setting.accepted(requests, values)
        if not requests:
            # An empty batch, so that later batches keep their numbers.
            self._force.add([])
            return
        contexts = setting.contexts(requests)
        for done, layer in enumerate(setting.layers):
            keys, reached = setting.read(contexts, layer)
            missing = (values - reached) / (len(setting.layers) - done)
            if self._averaged:
                columns = keys.unflatten(0, (-1, len(requests))).mean(0), missing
            else:
                columns = setting.weighted(keys, missing)
            change = self._rules[layer].update(*columns)
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
