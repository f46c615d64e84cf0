"""How well a layer's keys tell subjects apart: the fingerprints of probes, without any edit."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from coachhook.config import EditConfig
from coachhook.editing.layer_writer import ALIKE, layer_sketch
from coachhook.facts.request import EditRequest
from coachhook.models.architecture import Architecture
from coachhook.models.language_model import LanguageModel
from coachhook.models.reading import read_rows
from coachhook.models.tokens import Row, encode, encode_request
from coachhook.statistics.measure import KeyStatistics

SIZES = (32, 64, 128)
_FLOORS = tuple(step / 100 for step in range(30, 96))


@dataclass(frozen=True)
class ProbeSketches:
    """Centred sketches of one layer's keys, float32 `(…, 128)`; the first s numbers of a sketch are
    a sketch of size s.

    marks `(e, 128)` and owner `(e,)`: fingerprints of the probes, two each; reworded `(m, 128)` and
    reworded_owner: paraphrased subjects; others `(t, 128)` and others_prompt `(t,)`: all tokens of
    the locality prompts; background, first: see `LayerStatistics`. leverage: mean over the probes
    of `kᵀ C₀⁻¹ k`, estimated from the sketches.
    """

    marks: Tensor
    owner: Tensor
    reworded: Tensor
    reworded_owner: Tensor
    others: Tensor
    others_prompt: Tensor
    background: Tensor
    first: Tensor
    leverage: float


def probe_sketches(
    lm: LanguageModel,
    architecture: Architecture,
    statistics: KeyStatistics,
    probes: Sequence[EditRequest],
    contexts: Sequence[str],
) -> dict[int, ProbeSketches]:
    """The sketches of the probes' keys at every layer of `statistics`, read in one pass over each
    text."""
    n = len(probes)
    prompts = [
        encode_request(lm.tokenizer, probe, context, with_target=False)
        for context in ("{}", *contexts)
        for probe in probes
    ]
    reworded, reworded_owner = [], []
    for i, probe in enumerate(probes):
        for text in probe.paraphrases:
            end = text.rfind(probe.subject) + len(probe.subject)
            reworded.append(encode(lm.tokenizer, text, subject_end=end))
            reworded_owner.append(i)
    local = [encode(lm.tokenizer, p.prompt) for probe in probes for p in probe.locality]
    modules = [architecture.down_projection(lm.model, layer) for layer in statistics]
    subjects = _read(lm, modules, [*prompts, *reworded], every=False)
    tokens = _read(lm, modules, local, every=True)
    others_prompt = torch.tensor([i for i, row in enumerate(local) for _ in row.ids])
    largest = EditConfig(readout="delta", fingerprint_size=max(SIZES))
    sketches = {}
    for i, (layer, measured) in enumerate(statistics.items()):
        projection, offset = layer_sketch(measured, largest, measured.moment.device)

        def sketch(
            keys: Tensor, projection: Tensor = projection, offset: Tensor = offset
        ) -> Tensor:
            return keys.float() @ projection.T - offset

        keys = subjects[i][: len(prompts)].reshape(-1, n, subjects[i].shape[1])
        marks = torch.cat([keys[0], *([keys[1:].mean(0)] if len(keys) > 1 else [])])
        # ‖F k‖² is kᵀ (λ C₀)⁻¹ k on average over the random projection.
        spread = (keys[0] @ projection.T).square().sum(-1).mean()
        sketches[layer] = ProbeSketches(
            marks=sketch(marks),
            owner=torch.arange(len(marks)) % n,
            reworded=sketch(subjects[i][len(prompts) :]),
            reworded_owner=torch.tensor(reworded_owner),
            others=sketch(tokens[i]),
            others_prompt=others_prompt,
            background=sketch(measured.background),
            first=sketch(measured.first),
            leverage=largest.preservation * float(spread),
        )
    return sketches


def _read(
    lm: LanguageModel, modules: Sequence[Any], rows: Sequence[Row], *, every: bool
) -> list[Tensor]:
    """Keys of each module at the rows' subjects, or at every token: float32 `(…, d_in)`."""
    by_module = read_rows(lm, rows, modules, lambda _, keys, __: [keys.float()], every=every)
    return [keys for (keys,) in by_module]


@dataclass(frozen=True)
class Cosines:
    """Highest cosines with fingerprints, float32. reworded `(m,)`: of each paraphrased subject with
    those of its own edit; others `(p, n)`: of any token of each locality prompt with those of each
    edit; background `(b,)`: of each ordinary token with any fingerprint."""

    reworded: Tensor
    others: Tensor
    background: Tensor

    @classmethod
    def of(cls, sketches: ProbeSketches, size: int) -> "Cosines":
        """The cosines at fingerprints of `size` numbers."""
        marks, n = _unit(sketches.marks, size), int(sketches.owner.max()) + 1
        by_edit = sketches.owner[:, None] == torch.arange(n)

        def nearest(keys: Tensor) -> Tensor:
            cosines = (_unit(keys, size) @ marks.T)[:, :, None]
            return cosines.where(by_edit, -1.0).amax(1)

        reworded, tokens = nearest(sketches.reworded), nearest(sketches.others)
        prompts = range(int(sketches.others_prompt.max()) + 1)
        blocks = sketches.background.split(4096)
        return cls(
            reworded=reworded.gather(1, sketches.reworded_owner[:, None]).squeeze(1),
            others=torch.stack([tokens[sketches.others_prompt == i].amax(0) for i in prompts]),
            background=torch.cat([(_unit(block, size) @ marks.T).amax(1) for block in blocks]),
        )


@dataclass(frozen=True)
class Separation:
    """How well one lowest cosine separates subjects from other text, over some layers together.

    floor: the lowest cosine that should open a keyed gate; ceiling: the cosine that only the
    allowed share of ordinary tokens exceeds, at the layer where it is highest; recall: share of
    paraphrased subjects at or above the floor; firing: share of locality prompts in which some
    token reaches the floor. Both shares count each layer by itself.
    """

    floor: float
    ceiling: float
    recall: float
    firing: float

    @property
    def value(self) -> float:
        return self.recall - self.firing


def separation(layers: Sequence[Cosines], rate: float) -> Separation:
    """The floor that best separates paraphrased subjects from other prompts at `layers`; in the
    middle, where several are equally good. rate: share of background tokens that may clear it."""
    reworded = torch.cat([layer.reworded for layer in layers])
    others = torch.cat([layer.others for layer in layers])
    ceiling = max(_ceiling(layer.background, rate) for layer in layers)
    candidates = []
    for floor in _FLOORS:
        if floor >= ceiling or floor == _FLOORS[-1]:
            recall = float((reworded >= floor).float().mean())
            firing = float((others.amax(1) >= floor).float().mean())
            candidates.append(Separation(floor, ceiling, recall, firing))
    best = max(candidates, key=lambda s: s.value).value
    equal = [s for s in candidates if s.value > best - 1e-9]
    return equal[len(equal) // 2]


def sink_share(sketches: ProbeSketches, size: int) -> float:
    """Share of pairs of first words with nearly the same key: near 1 where a layer has an attention
    sink."""
    first = _unit(sketches.first, size)
    return float(((first @ first.T) >= ALIKE).float().mean())


def _ceiling(scores: Tensor, rate: float) -> float:
    return float(scores.sort(descending=True).values[int(rate * len(scores))])


def _unit(sketches: Tensor, size: int) -> Tensor:
    return normalize(sketches[:, :size], dim=-1)
