"""How well the FFN inputs of a block tell subjects apart, before any edit: a memory gate there."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from coachhook.calibration.gate_probes import GateProbes
from coachhook.config import EditConfig, MemoryConfig
from coachhook.editing.forms import Form, Rival, forms_of, rivals_of
from coachhook.editing.layer_writer import KeySketches, layer_sketch
from coachhook.editing.memory_writing import ceiling
from coachhook.models.architecture import Architecture
from coachhook.models.language_model import LanguageModel
from coachhook.models.reading import read_rows
from coachhook.models.tokens import Row
from coachhook.statistics.measure import KeyStatistics


@dataclass(frozen=True)
class GateFigures:
    """One block's gate that holds all gate probes at once, on the threshold that editing would
    choose if no least one were set (`MemoryConfig`).

    Shares, 0 to 1: recall, of paraphrases whose own entry opens; forms, of the texts behind the
    fingerprints that do; neighbours, of prompts in which any token opens an entry of another
    subject; alike, of made-up names that end as an entry's; ordinary, of ordinary tokens. Cosines:
    need, what 95 % of the paraphrases reach with their own entry; reach, what 99 % of the
    neighbours' prompts stay below.
    """

    block: int
    threshold: float
    recall: float
    forms: float
    neighbours: float
    alike: float
    ordinary: float
    need: float
    reach: float

    @property
    def margin(self) -> float:
        """The room between what paraphrases need and the threshold, which grows with the edits."""
        return self.need - self.threshold

    @property
    def least(self) -> float:
        """The lowest threshold to edit with, half-way from the threshold here to what paraphrases
        need: few edits would set it lower than that, and open for names that more edits show to be
        too near."""
        return (self.threshold + max(self.threshold, self.need)) / 2


@dataclass(frozen=True)
class GateKeys:
    """One block's keys of the gate probes, float32. forms, rivals `(r, d)`: of all their rows;
    reworded `(p, d)`; neighbours `(t, d)`: of all tokens; alike `(a, d)`."""

    forms: Tensor
    rivals: Tensor
    reworded: Tensor
    neighbours: Tensor
    alike: Tensor


def gate_figures(
    lm: LanguageModel,
    architecture: Architecture,
    statistics: KeyStatistics,
    probes: GateProbes,
    config: EditConfig,
) -> list[GateFigures]:
    """The figures of every block of `statistics`, read in one pass over each text."""
    forms = forms_of(lm, probes.requests, config.memory)
    subjects = [request.subject for request in probes.requests]
    rivals = rivals_of(lm, probes.requests, subjects, config.memory)
    modules = [architecture.ffn(lm.model, block) for block in statistics]

    def read(rows: Sequence[Row], *, every: bool = False) -> list[Tensor]:
        found = read_rows(lm, rows, modules, lambda _, keys, __: [keys.float()], every=every)
        return [keys for (keys,) in found]

    keys = zip(
        read([row for form in forms for row in form.rows]),
        read([row for rival in rivals for row in rival.rows]),
        read(probes.reworded),
        read(probes.neighbours, every=True),
        read(probes.alike),
        strict=True,
    )
    found = []
    for (block, measured), at_block in zip(statistics.items(), keys, strict=True):
        sketch = layer_sketch(measured, config, measured.moment.device)
        sketches = KeySketches.of_keys(measured, sketch)
        found.append(
            _figures(block, sketches, (forms, rivals), GateKeys(*at_block), probes, config.memory)
        )
    return found


def _figures(
    block: int,
    sketches: KeySketches,
    made: tuple[Sequence[Form], Sequence[Rival]],
    keys: GateKeys,
    probes: GateProbes,
    config: MemoryConfig,
) -> GateFigures:
    forms, rivals = made
    groups = [len(form.rows) for form in forms]
    of_form = torch.tensor([form.request for form in forms])
    marks = sketches.of_groups(keys.forms, groups)
    against = sketches.of_groups(keys.rivals, [len(rival.rows) for rival in rivals])
    kept = sketches.distinct(marks, config.ordinary)
    # An entry without a fingerprint of its own has cosine -1 to everything.
    n = len(probes.requests)

    def nearest(marked: Tensor) -> Tensor:
        """The largest cosine of each sketch to a fingerprint of each entry, `(…, n)`; -1 for those
        that resemble a rival more."""
        cosines = marked @ marks[kept].T
        entry = of_form[kept].expand(len(marked), -1)
        of_entry = cosines.new_full((len(marked), n), -1.0)
        of_entry = of_entry.scatter_reduce(1, entry, cosines, "amax")
        closed = (marked @ against.T).amax(1) > of_entry.amax(1)
        return of_entry.masked_fill(closed[:, None], -1.0)

    tokens = nearest(sketches.fingerprint(keys.neighbours))
    about = torch.tensor(probes.about)
    by_prompt = tokens.split([len(row.ids) for row in probes.neighbours])
    others = torch.stack([of_prompt.amax(0) for of_prompt in by_prompt])
    prompts = others.masked_fill(about[:, None] == torch.arange(n), -1.0).amax(1)
    alike = nearest(sketches.fingerprint(keys.alike)).amax(1)
    ordinary = torch.cat([nearest(part).amax(1) for part in sketches.sketched.split(4096)])
    stated = ((ordinary, config.ordinary), (prompts, config.neighbours))
    threshold = min(1.0, max(ceiling(scores, share) for scores, share in stated))
    owner = torch.tensor(probes.owner)
    reworded = nearest(sketches.fingerprint(keys.reworded))
    of_row = of_form.repeat_interleave(torch.tensor(groups))
    formed = nearest(sketches.fingerprint(keys.forms))
    return GateFigures(
        block=block,
        threshold=threshold,
        recall=_opening_own(reworded, owner, threshold),
        forms=_opening_own(formed, of_row, threshold),
        neighbours=_share(prompts, threshold),
        alike=_share(alike, threshold),
        ordinary=_share(ordinary, threshold),
        need=float(reworded.gather(1, owner[:, None]).quantile(0.05)),
        reach=float(prompts.quantile(0.99)),
    )


def _opening_own(scores: Tensor, owner: Tensor, threshold: float) -> float:
    """Share of rows of `scores` `(r, n)` whose highest is that of `owner`, and high enough."""
    best, which = scores.max(1)
    return float(((best >= threshold) & (which == owner)).float().mean())


def _share(scores: Tensor, threshold: float) -> float:
    return float((scores >= threshold).float().mean())


def chosen_gate(figures: Sequence[GateFigures], n: int, usual: int) -> GateFigures:
    """Of the blocks whose recall is within a standard error of the best, as n entries tell it, the
    `usual` one if it is among them; else the one with the widest margin; of equals, the
    earliest."""
    best = max(found.recall for found in figures)
    # Of the share with one success and one failure more, which does not end at 0 and 1.
    likely = (best * n + 1) / (n + 2)
    noise = math.sqrt(likely * (1 - likely) / n)
    within = [found for found in figures if found.recall >= best - noise]
    return max(within, key=lambda found: (found.block == usual, found.margin))
