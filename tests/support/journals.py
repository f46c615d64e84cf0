"""Small journals for tests, always the same, and what folders of them hold."""

import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from coachhook.config import EditConfig, ValueConfig
from coachhook.facts.request import EditRequest
from coachhook.hooks.gates import Threshold
from coachhook.journal.factors import FACTORS, LayerFactors
from coachhook.journal.journal import Batch, EditRecord, Journal, Verdict
from coachhook.models.base import BaseModel
from coachhook.storage.folder import CONFIG_NAME, Contents

LAYERS = {1: (12, 8), 3: (12, 8)}
SKETCH = 4


def tensor(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def batch(number: int, subject: str = "Zürich 東京", rows: int = 2) -> Batch:
    """Batch `number` (from 0) of any journal, always the same: two edits, written to two layers."""
    records = [
        EditRecord(2 * number + i, EditRequest("{} is in", f"{subject} {number}/{i}", "Italy"))
        for i in range(2)
    ]
    records[1].verdict, records[1].reason = Verdict.WEAK, "the gate stays closed at layer 3"
    layers = {
        layer: LayerFactors(
            residuals=tensor(rows, 8, seed=10 * number + layer),
            solutions=tensor(rows, 12, seed=10 * number + layer + 1),
            keys=tensor(3, 12, seed=10 * number + layer + 2),
            fingerprints=tensor(3, SKETCH, seed=10 * number + layer + 3),
            owner=torch.tensor([0, 1, 1]),
        )
        for layer in LAYERS
    }
    return Batch(records, layers, {1: Threshold(0.1, 0.2, 3.0 + number), 3: Threshold()})


def contents(n_batches: int, **options: Any) -> Contents:
    return Contents(
        base=BaseModel("tiny", {"bfloat16": "a" * 64, "float16": "b" * 64}, "h.{}.down", LAYERS),
        config=EditConfig(readout="delta", layers=(1, 3), values=ValueConfig(steps=3)),
        sketches={
            layer: (tensor(SKETCH, 12, seed=layer), tensor(SKETCH, seed=layer)) for layer in LAYERS
        },
        journal=Journal([batch(number, **options) for number in range(n_batches)]),
    )


def assert_same(got: Contents, want: Contents) -> None:
    assert got.base == want.base
    assert got.config == want.config
    assert got.journal.edits() == want.journal.edits()
    assert len(got.journal.batches) == len(want.journal.batches)
    for ours, theirs in zip(got.journal.batches, want.journal.batches, strict=True):
        assert ours.thresholds == theirs.thresholds
        assert ours.layers.keys() == theirs.layers.keys()
        for layer in LAYERS:
            for name in FACTORS:
                value = getattr(theirs.layers[layer], name)
                found = getattr(ours.layers[layer], name)
                assert found.dtype == value.dtype
                assert torch.equal(found, value)
    for layer in LAYERS:
        for found, value in zip(got.sketches[layer], want.sketches[layer], strict=True):
            assert torch.equal(found, value)


def files(folder: Path) -> dict[str, bytes]:
    """What the folder holds, but for its lock."""
    return {f.name: f.read_bytes() for f in sorted(folder.iterdir()) if f.name != ".lock"}


def file_like(folder: Path, pattern: str) -> Path:
    [found] = folder.glob(pattern)
    return found


def rewrite(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the configuration as one who knows the format would: with a digest that fits."""
    path = folder / CONFIG_NAME
    config = json.loads(path.read_text())
    change(config)
    config.pop("digest", None)
    body = json.dumps(config, sort_keys=True).encode()
    path.write_text(json.dumps({**config, "digest": hashlib.sha256(body).hexdigest()}))


def random_batch(rng: random.Random, first: int, facts: int = 6) -> Batch:
    """One to four edits of a few facts from id `first`, some refused, some without fingerprints."""
    n = rng.randint(1, 4)
    records = [
        EditRecord(first + i, EditRequest("{} is in", f"Place {rng.randrange(facts)}", "Italy"))
        for i in range(n)
    ]
    for record in records:
        if rng.random() < 0.2:
            record.verdict = Verdict.REFUSED
        record.enabled = rng.random() < 0.8
    written = [i for i, r in enumerate(records) if r.verdict is not Verdict.REFUSED] * 2
    rows = [i for i in written if rng.random() < 0.8]

    def some(*shape: int) -> Tensor:
        return tensor(*shape, seed=rng.randrange(2**30))

    return Batch(
        records,
        {
            layer: LayerFactors(
                residuals=some(n, 8),
                solutions=some(n, 12),
                keys=some(2 * n, 12),
                fingerprints=normalize(some(len(rows), SKETCH), dim=-1),
                owner=torch.tensor(rows, dtype=torch.long),
            )
            for layer in LAYERS
        },
        {layer: Threshold() for layer in LAYERS},
    )


def grow_and_shrink(journal: Journal, rng: random.Random) -> None:
    """What may happen next to a journal: a batch, one that fails, or a way back."""
    first = len(journal.edits())
    if journal.batches and rng.random() < 0.2:
        journal.forget_after(rng.randint(journal.merged, len(journal.batches)))
        first = len(journal.edits())
    journal.batches.append(random_batch(rng, first))
    if rng.random() < 0.2:
        journal.batches.pop()
