"""Where the gates of a hook set open: at edited subjects, in locality prompts, in other text."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from coachhook.evaluation.ordinary_text import pieces
from coachhook.facts.request import EditRequest
from coachhook.hooks.layer import HookLinear
from coachhook.hookset import HookSet
from coachhook.models.language_model import LanguageModel
from coachhook.models.reading import read_rows
from coachhook.models.tokens import Row, encode, tokenize

# Enough to draw a population; the first and the last are its extremes.
QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
# Requests, and tokens of ordinary text, that are shown token by token.
_SHOWN, _SHOWN_TOKENS = 4, 160


@dataclass(frozen=True)
class LayerScores:
    """One layer's gate. z: by population, the `QUANTILES` of its tokens' z-scores (under the memory
    readout of their cosines), or None where no token has a finite one. The populations: last tokens
    of `edited` and of `paraphrased` subjects, all tokens of locality prompts (`beside`) and of
    `ordinary` text. alpha: the lowest z that opens the gate; None where none does."""

    layer: int
    alpha: float | None
    z: dict[str, list[float] | None]


@dataclass(frozen=True)
class Sample:
    """A text in tokens; n_open: the number of layers whose gate each token opens; kind: the
    population's name."""

    kind: str
    tokens: list[str]
    n_open: list[int]


@dataclass(frozen=True)
class GateScores:
    """Shares, 0 to 1, of tokens that open a gate.

    gate: its name, "memory" under that readout. recall, paraphrase_recall: of subjects' last
    tokens, over all layers; ordinary: of tokens of ordinary text, at any layer; by_layer: the same
    at each layer; locality: of tokens of locality prompts, at any layer; precision: of all openings
    in prompts, paraphrases and locality prompts, those at subjects' last tokens. layers, samples:
    to look at.
    """

    gate: str
    recall: float
    paraphrase_recall: float | None
    precision: float | None
    ordinary: float
    by_layer: dict[int, float]
    locality: float | None
    layers: list[LayerScores]
    samples: list[Sample]


def gate_scores(
    lm: LanguageModel, hooks: HookSet, requests: Sequence[EditRequest], text: str
) -> GateScores:
    """Read the gates of `hooks`, attached to the model, over the texts of `requests` and `text`."""
    prompts, reworded = [], []
    for request in requests:
        end = request.subject_span[1]
        prompts.append(encode(lm.tokenizer, request.prompt, subject_end=end))
        for paraphrase in request.paraphrases:
            if request.subject in paraphrase:
                end = paraphrase.rfind(request.subject) + len(request.subject)
                reworded.append(encode(lm.tokenizer, paraphrase, subject_end=end))
    ordinary = [Row(tuple(piece), len(piece) - 1) for piece in pieces(lm, text)]
    local = [encode(lm.tokenizer, p.prompt) for r in requests for p in r.locality]
    at_prompts = _read(lm, hooks, prompts)
    at_reworded = _read(lm, hooks, reworded)
    at_local = _read(lm, hooks, local)
    readings = {
        "edited": _at_subjects(at_prompts, prompts),
        "paraphrased": _at_subjects(at_reworded, reworded),
        "beside": _joined(at_local),
        "ordinary": _joined(_read(lm, hooks, ordinary)),
    }
    opened = {name: reading.is_open for name, reading in readings.items()}
    total = float(_joined([*at_prompts, *at_reworded, *at_local]).is_open.sum())
    right = float(opened["edited"].sum() + opened["paraphrased"].sum())
    alphas = [hook.alpha for hook in hooks.modules(lm.model).values()]
    return GateScores(
        gate="memory" if hooks.config.readout == "memory" else hooks.config.gate,
        recall=float(opened["edited"].float().mean()),
        paraphrase_recall=float(opened["paraphrased"].float().mean()) if reworded else None,
        precision=right / total if total else None,
        ordinary=float(opened["ordinary"].any(0).float().mean()),
        by_layer=dict(zip(hooks.layers, opened["ordinary"].float().mean(1).tolist(), strict=True)),
        locality=float(opened["beside"].any(0).float().mean()) if local else None,
        layers=[
            LayerScores(
                layer,
                alpha if math.isfinite(alpha) else None,
                {name: spread(r.z[i : i + 1]) for name, r in readings.items()},
            )
            for i, (layer, alpha) in enumerate(zip(hooks.layers, alphas, strict=True))
        ],
        samples=_samples(lm, hooks, requests, text),
    )


@dataclass(frozen=True)
class _Reading:
    """The gates at some tokens: is_open bool and z float32, both `(layers, t)`."""

    is_open: Tensor
    z: Tensor


def _at_subjects(readings: Sequence[_Reading], rows: Sequence[Row]) -> _Reading:
    """The readings at the subjects' last tokens."""
    ends = [slice(row.subject, row.subject + 1) for row in rows]
    pairs = zip(readings, ends, strict=True)
    return _joined([_Reading(read.is_open[:, end], read.z[:, end]) for read, end in pairs])


def _joined(readings: Sequence[_Reading]) -> _Reading:
    if not readings:
        return _Reading(torch.zeros(0, 0, dtype=torch.bool), torch.zeros(0, 0))
    return _Reading(
        torch.cat([read.is_open for read in readings], dim=1),
        torch.cat([read.z for read in readings], dim=1),
    )


def spread(z: Tensor) -> list[float] | None:
    """The `QUANTILES` of the finite ones of `z` `(n,)`; None where there are none."""
    z = z[z.isfinite()]
    if not len(z):
        return None
    quantiles: list[float] = z.quantile(torch.tensor(QUANTILES)).tolist()
    return quantiles


def _samples(
    lm: LanguageModel, hooks: HookSet, requests: Sequence[EditRequest], text: str
) -> list[Sample]:
    spans = tokenize(lm.tokenizer, text)[1][
        : min(_SHOWN_TOKENS, lm.context_length or _SHOWN_TOKENS)
    ]
    texts = [("ordinary", text[: spans[-1][1]])]
    for request in requests[:_SHOWN]:
        texts.append(("edited", request.prompt))
        texts += [("paraphrased", paraphrase) for paraphrase in request.paraphrases[:1]]
        texts += [("beside", beside.prompt) for beside in request.locality[:1]]
    samples = []
    for kind, shown in texts:
        trace = hooks.trace(*lm, shown)
        samples.append(Sample(kind, trace.tokens, trace.is_open.sum(0).tolist()))
    return samples


def _read(lm: LanguageModel, hooks: HookSet, rows: Sequence[Row]) -> list[_Reading]:
    """The gates at all tokens of each row."""
    if not rows:
        return []

    def gates(hook: HookLinear, keys: Tensor, _: slice) -> Sequence[Tensor]:
        reading = hook.read(keys)
        return reading.is_open, reading.z.float()

    modules = list(hooks.modules(lm.model).values())
    by_layer = read_rows(lm, rows, modules, gates, every=True)
    lengths = [len(row.ids) for row in rows]
    is_open, z = (torch.stack(layers) for layers in zip(*by_layer, strict=True))
    pairs = zip(is_open.split(lengths, dim=1), z.split(lengths, dim=1), strict=True)
    return [_Reading(*pair) for pair in pairs]
