"""The cost of each further batch, from the first to the last: seconds, and memory.

    python -m bench.editing.growth [--batches 200] [--edits 25] [--gate keyed] [--json]

Random factors at the embedded model's shapes go through the editor's own path: Δ, gates, threshold,
folder. No model runs, so only this bookkeeping is timed.
"""

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from bench.harness.script import Json, run_script
from coachhook.config import EditConfig
from coachhook.editing.layer_writer import LayerWriter
from coachhook.editing.thresholds import threshold
from coachhook.facts.request import EditRequest, LocalityPrompt
from coachhook.hooks.gates import Threshold
from coachhook.hookset import HookSet
from coachhook.journal.factors import LayerFactors
from coachhook.journal.journal import Batch, EditRecord
from coachhook.models.base import BaseModel

D_IN, D_OUT = 1536, 576
LAYERS = (9, 10, 11)
BACKGROUND = 16_384
CONTEXTS = 3


class Layers(nn.Module):
    """The part of a model that hooks are attached to."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleDict({str(i): nn.Linear(D_IN, D_OUT, bias=False) for i in LAYERS})

    def forward(self, input_ids: Tensor) -> Tensor:
        raise NotImplementedError("these layers are only there to carry hooks")


def unit_rows(n: int, size: int, rng: torch.Generator) -> Tensor:
    return nn.functional.normalize(torch.randn(n, size, generator=rng), dim=-1)


def factors(n: int, size: int, rng: torch.Generator) -> LayerFactors:
    return LayerFactors(
        residuals=torch.randn(n, D_OUT, generator=rng),
        solutions=torch.randn(n, D_IN, generator=rng) / D_IN,
        keys=torch.randn(CONTEXTS * n, D_IN, generator=rng),
        fingerprints=unit_rows(2 * n, size, rng),
        owner=torch.arange(2 * n) % n,
    )


def request(number: int, distinct: int) -> EditRequest:
    """One fact in eight is the correction of an earlier one."""
    subject = f"Subject {number % distinct if number % 8 == 7 else number}"
    return EditRequest(
        "The mother tongue of {} is",
        subject,
        f"language {number}",
        (f"{subject} was raised speaking", f"{subject}, a native speaker of"),
        tuple(
            LocalityPrompt(f"The mother tongue of Neighbour {i} of {number} is", "French")
            for i in range(8)
        ),
    )


def empty_hooks(gate: str) -> tuple[HookSet, dict[int, LayerWriter]]:
    """A hook set without edits, and the writers of its layers, without an inverse."""
    config = EditConfig(readout="delta", layers=LAYERS, gate=gate)
    rng = torch.Generator().manual_seed(0)
    sketches, writers = {}, {}
    for layer in LAYERS:
        projection = torch.randn(config.fingerprint_size, D_IN, generator=rng) / D_IN**0.5
        offset = torch.zeros(config.fingerprint_size)
        sketches[layer] = (projection, offset)
        background = torch.randn(BACKGROUND, D_IN, generator=rng).bfloat16()
        sketched = nn.functional.normalize(background.float() @ projection.T, dim=-1)
        unused: Any = None
        writers[layer] = LayerWriter(
            projection, offset, sketched, sketched[:1024], solver=unused, background=background
        )
    shapes = dict.fromkeys(LAYERS, (D_IN, D_OUT))
    checksums = {"bfloat16": "0" * 64}
    base = BaseModel("synthetic", checksums, "down.{}", shapes)
    return HookSet(base, config, sketches), writers


def add_batch(
    hooks: HookSet,
    writers: dict[int, LayerWriter],
    model: Layers,
    requests: list[EditRequest],
    rng: torch.Generator,
) -> None:
    """The work of `write_batch` after the factors of a layer are solved for."""
    first = len(hooks.edits)
    batch = Batch([EditRecord(first + i, r) for i, r in enumerate(requests)], {}, {})
    hooks.journal.batches.append(batch)
    rate = hooks.config.false_alarms / len(LAYERS)
    for layer, hook in hooks.modules(model).items():
        batch.layers[layer] = factors(len(requests), hooks.config.fingerprint_size, rng)
        batch.thresholds[layer] = Threshold()
        hooks.refresh([layer])
        unused: Any = None
        batch.thresholds[layer] = threshold(
            hooks, unused, layer, hook, writers[layer], unused, rate
        )
        hooks.refresh([layer])


def measure(batches: int = 200, edits: int = 25, gate: str = "keyed") -> list[dict[str, Any]]:
    """One entry a batch: seconds of its hooks (Δ, gates and thresholds of all layers), seconds to
    save the folder, and resident memory in MB after it. The last entry: seconds to load the folder
    and to attach, before and after compaction, and of compaction itself. Seconds are CPU time,
    which other work on the machine disturbs less, and which does not count waiting for the disk.
    """
    hooks, writers = empty_hooks(gate)
    model, rng = Layers(), torch.Generator().manual_seed(1)
    hooks.attach(model, check=False)
    process = psutil.Process()
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        for number in range(batches):
            distinct = max(1, number * edits // 2)
            wanted = [request(number * edits + i, distinct) for i in range(edits)]
            started = time.process_time()
            add_batch(hooks, writers, model, wanted, rng)
            written = time.process_time()
            hooks.save_pretrained(name)
            saved = time.process_time()
            found.append(
                {
                    "batch": number + 1,
                    "edits": (number + 1) * edits,
                    "hooks_s": written - started,
                    "save_s": saved - written,
                    "rss_mb": process.memory_info().rss / 1e6,
                    "config_kb": (Path(name) / "hook_config.json").stat().st_size / 1e3,
                }
            )
        fresh, times = load_and_attach(name)
        started = time.process_time()
        fresh.compact()
        fresh.save_pretrained(name)
        times["compact_s"] = time.process_time() - started
        times["folder_mb"] = sum(file.stat().st_size for file in Path(name).iterdir()) / 1e6
        compacted = load_and_attach(name)[1]
        found.append(times | {f"compacted_{key}": value for key, value in compacted.items()})
    return found


def load_and_attach(name: str) -> tuple[HookSet, dict[str, float]]:
    started = time.process_time()
    hooks = HookSet.from_pretrained(name)
    loaded = time.process_time()
    hooks.attach(Layers(), check=False)
    return hooks, {"load_s": loaded - started, "attach_s": time.process_time() - loaded}


def main(
    batches: int = 200,
    edits: int = 25,
    gate: str = "keyed",
    as_json: Json = False,
) -> None:
    """Write batch after batch into three layers, and measure each."""
    *found, fresh = measure(batches, edits, gate)
    if as_json:
        print(json.dumps({"batches": found, "fresh": fresh}))
        return
    table = Table(title=f"{edits} edits a batch, three layers of {D_IN} × {D_OUT}, {gate} gate")
    for column in ("batch", "edits", "hooks, ms", "save, ms", "memory, MB", "configuration, kB"):
        table.add_column(column, justify="right")
    for row in found:
        number = row["batch"]
        if number in (1, 2, 5, 10, 20, 50) or number % 50 == 0 or number == batches:
            table.add_row(
                str(number),
                str(row["edits"]),
                # A median, so that one hiccup of the machine is not taken for growth.
                f"{1e3 * middle(found, number, 'hooks_s'):.1f}",
                f"{1e3 * middle(found, number, 'save_s'):.1f}",
                f"{row['rss_mb']:.0f}",
                f"{row['config_kb']:.0f}",
            )
    console = Console()
    console.print(table)
    console.print(
        f"fresh: load {fresh['load_s']:.2f} s, attach {fresh['attach_s']:.2f} s; compacted in "
        f"{fresh['compact_s']:.2f} s to {fresh['folder_mb']:.0f} MB: load "
        f"{fresh['compacted_load_s']:.2f} s, attach {fresh['compacted_attach_s']:.2f} s"
    )


def middle(found: list[dict[str, Any]], number: int, name: str) -> float:
    """The median of up to five batches that end at `number`."""
    last = sorted(row[name] for row in found[max(0, number - 5) : number])
    return float(last[len(last) // 2])


if __name__ == "__main__":
    run_script(main)
