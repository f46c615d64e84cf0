"""The cost of key statistics beside the forward pass that they are read from.

    python -m bench.editing.key_statistics [--model smollm2] [--rounds 5] [--threads 2] [--json]

Two passes read the same tokens in turns. The bare pass ends at the last hooked layer and ignores
the keys. The other does what `coachhook statistics` does with a given text, but for saving;
sampling a text would take longer than both. The ratio of CPU seconds is given as well, which other
work on the machine disturbs less.
"""

import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench.harness.machine import use_threads
from bench.harness.script import Json, Threads, run_script
from bench.harness.timing import take_turns
from coachhook.models.architecture import Architecture, default_layers
from coachhook.models.loading import load_model
from coachhook.models.passes import read_pass
from coachhook.statistics.sums import KeyReader, KeySums
from coachhook.statistics.text import SEQUENCE_LENGTH, Shard, TokenBatch

# Fewer than a shard has, so that other work on the machine hardly changes within a round.
SEQUENCES = 32


def measure(model: str = "smollm2", rounds: int = 5) -> dict[str, Any]:
    """Tokens a second of both passes, medians over the rounds. `statistics_overhead` is the median
    ratio of speeds within a round, with statistics to bare: at 1 statistics would be free."""
    lm = load_model(model)
    architecture = Architecture.of(lm.model)
    layers = default_layers(len(architecture.blocks(lm.model)))
    modules = {layer: architecture.down_projection(lm.model, layer) for layer in layers}
    reader = KeyReader(lm, modules)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(len(lm.tokenizer), (SEQUENCES, SEQUENCE_LENGTH), generator=generator)
    shard = Shard(0, ids.numel(), lambda _: [TokenBatch(ids)])
    sums = KeySums.like(reader.read(TokenBatch(ids)))
    cpu_seconds: dict[str, list[float]] = {"bare": [], "statistics": []}

    def bare() -> None:
        read_pass(lm.model, {"input_ids": ids.to(lm.device)}, inputs_of=[modules[layers[-1]]])

    def with_statistics() -> None:
        sums.add(reader, shard, shard.read(lambda _: None), shard.n_tokens)

    def counted(name: str, step: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            started = time.process_time()
            step()
            cpu_seconds[name].append(time.process_time() - started)

        return run

    bare()
    steps = {"bare": counted("bare", bare), "statistics": counted("statistics", with_statistics)}
    timings = take_turns(steps, rounds, lm.device)
    ratio, spread = timings["bare"].over(timings["statistics"])
    cpu = [a / b for a, b in zip(*cpu_seconds.values(), strict=True)]
    return {
        "model": model,
        "layers": list(layers),
        "tokens_a_batch": ids.numel(),
        "bare_tokens_per_second": ids.numel() / timings["bare"].median,
        "statistics_tokens_per_second": ids.numel() / timings["statistics"].median,
        "statistics_overhead": ratio,
        "statistics_overhead_spread": spread,
        "statistics_overhead_cpu_seconds": statistics.median(cpu),
    }


def main(
    model: str = "smollm2",
    rounds: int = 5,
    threads: Threads = 2,
    as_json: Json = False,
) -> None:
    """Measure both on a model."""
    use_threads(threads)
    found = measure(model, rounds)
    if as_json:
        print(json.dumps(found))
        return
    table = Table(title=f"key statistics of layers {found['layers']} of {model}, {threads} threads")
    table.add_column("pass")
    table.add_column("tokens/s", justify="right")
    table.add_row("bare, to the last hooked layer", f"{found['bare_tokens_per_second']:.0f}")
    table.add_row("with statistics", f"{found['statistics_tokens_per_second']:.0f}")
    ratio, spread = found["statistics_overhead"], found["statistics_overhead_spread"]
    table.add_row("with statistics ÷ bare", f"{ratio:.3f} ± {spread / 2:.3f}")
    table.add_row("the same in CPU seconds", f"{found['statistics_overhead_cpu_seconds']:.3f}")
    Console().print(table)


if __name__ == "__main__":
    run_script(main)
