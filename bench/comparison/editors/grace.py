"""GRACE: a growing codebook at one layer; a key within the radius of an entry gets its output.

It differs from the publication in what all editors here share: keys are those of the subject's last
token, values come from the common optimisation, the layer is the last hooked one, and every token
of a text is looked up. Radii do not grow where targets are the same, since values differ by
subject. They are in units of the median distance between keys of ordinary text (a few sinks
dominate the mean).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import coachhook as ch
from bench.comparison.editors.setting import InForce, Setting


class Codebook(nn.Module):
    """A down-projection that returns an entry's output for keys near it.

    keys `(e, d_in)`, outputs `(e, d_out)`, radii `(e,)` in the units of the keys.
    """

    def __init__(self, base: Any, d_in: int) -> None:
        super().__init__()
        self.base = base
        weight = base.weight
        self.keys = torch.zeros(0, d_in, device=weight.device)
        self.outputs = torch.zeros(0, weight.numel() // d_in, device=weight.device)
        self.radii = torch.zeros(0, device=weight.device)
        self.on = True

    def forward(self, keys: Tensor) -> Tensor:
        output: Tensor = self.base(keys)
        if not self.on or not len(self.keys):
            return output
        distance, entry = torch.cdist(keys.float(), self.keys).min(-1)
        inside = distance <= self.radii[entry]
        return torch.where(inside[..., None], self.outputs[entry].to(output.dtype), output)

    def add(self, key: Tensor, output: Tensor, radius: float) -> int:
        """Add an entry and return its number. If it would overlap the nearest entry, both radii
        become half their distance; an entry with the same key takes the new output instead."""
        distances = (self.keys - key).norm(dim=-1)
        if len(distances) and distances.min() == 0:
            number = int(distances.argmin())
            self.outputs[number] = output
            return number
        if len(distances):
            distance, nearest = distances.min(0)
            if distance <= radius + self.radii[nearest]:
                radius = float(distance) / 2
                self.radii[nearest] = radius
        self.keys = torch.cat([self.keys, key[None]])
        self.outputs = torch.cat([self.outputs, output[None]])
        self.radii = torch.cat([self.radii, self.radii.new_tensor([radius])])
        return len(self.keys) - 1

    def keep(self, which: Tensor) -> None:
        self.keys, self.outputs, self.radii = (
            t[which] for t in (self.keys, self.outputs, self.radii)
        )


class Grace:
    """radius: of a new entry, in units of the median distance between ordinary keys."""

    def __init__(self, setting: Setting, radius: float) -> None:
        self._setting, layer = setting, setting.layers[-1]
        background = setting.statistics[layer].background[:1024].float()
        self._radius = radius * float(torch.pdist(background).median())
        d_in = setting.architecture.d_in(setting.lm.model, layer)
        self._codebook = Codebook(setting.down_projection(layer), d_in)
        setting.lm.model.set_submodule(setting.architecture.name(layer), self._codebook)
        self._facts: list[tuple[str, str]] = []
        self._force = InForce()
        self.edits = self

    def in_force(self) -> list[list[ch.EditRequest]]:
        return self._force.in_force()

    def edit(self, requests: Sequence[ch.EditRequest], values: Tensor) -> None:
        setting, book = self._setting, self._codebook
        requests, values = setting.accepted(requests, values)
        if not requests:
            # An empty batch, so that later batches keep their numbers.
            self._force.add([])
            return
        contexts = setting.contexts(requests)
        keys, reached = setting.read(contexts, setting.layers[-1])
        device = book.keys.device
        keys, missing = keys[: len(requests)].to(device), (values - reached).to(device)
        # The layer's output with the entries so far, from which `reached` was read.
        with torch.no_grad():
            wanted = book(keys.to(book.base.weight.dtype)).float() + missing
        replaced = {request.fact for request in requests}
        stay = [fact not in replaced for fact in self._facts]
        book.keep(torch.tensor(stay, dtype=torch.bool, device=device))
        self._facts = [fact for fact in self._facts if fact not in replaced]
        for key, output, request in zip(keys, wanted, requests, strict=True):
            number = book.add(key, output, self._radius)
            self._facts[number : number + 1] = [request.fact]
        self._force.add(requests)

    @contextmanager
    def off(self, model: Any) -> Iterator[Any]:
        self._codebook.on = False
        try:
            yield model
        finally:
            self._codebook.on = True

    def held(self) -> int:
        tensors = (self._codebook.keys, self._codebook.outputs, self._codebook.radii)
        return sum(t.numel() * t.element_size() for t in tensors)
