"""Generation with and without edits: time to first token, tokens a second, peak memory.

    python -m bench.inference [--gate keyed|calibrated|memory] [--edits 1000] [--json PATH or -]
    python -m bench.inference --shape llama-3-8b      # random weights, on a GPU

Hooked and unhooked passes alternate, token by token, on the same weights; ratios are medians over
the pairs. The edits are synthetic: a random Δ, or rows of a memory, and random fingerprints behind
a gate that no token of the run opens. Before any timing it is checked that closed hooks leave the
model's output unchanged and that an open one changes it; if not, the exit code is 1. On a GPU
decoding replays a CUDA graph over a static cache.
"""

import os
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from bench.harness.machine import device_name, machine, main_device, use_threads
from bench.harness.memory import peak_memory
from bench.harness.output import put
from bench.harness.script import JsonTo, Threads, only_right_results, run_script
from bench.harness.timing import Timings, copy_bandwidth, take_turns
from bench.inference.memory import SyntheticMemory
from bench.inference.sessions import Session, check, check_steps, prefill, random_prompt
from bench.inference.shapes import (
    LOADED,
    SHAPES,
    Shape,
    Synthetic,
    SyntheticHooks,
    build,
    bytes_read,
)

VARIANTS = ("unhooked", "hooked")
GATES = ("keyed", "calibrated", "memory")
Row = dict[str, Any]


class Run:
    """The measurements of one model, after its checks."""

    def __init__(self, model: Any, shape: Shape, hooks: Synthetic, progress: Progress) -> None:
        self.model = model
        self.shape = shape
        self.hooks = hooks
        self.progress = progress
        self.bandwidth = copy_bandwidth(model.device)

    def _turns(self, steps: dict[str, Any], rounds: int, what: str) -> dict[str, Timings]:
        task = self.progress.add_task(what, total=2 * rounds)

        def before(name: str) -> None:
            self.hooks.set(name == "hooked")
            self.progress.advance(task)

        try:
            return take_turns(steps, rounds, self.model.device, before)
        finally:
            self.hooks.set(False)

    def first_token(self, length: int, rounds: int) -> Row:
        prompt = random_prompt(self.model, 1, length)
        # A round that is not counted: the first pass of a length picks algorithms and allocates.
        steps = dict.fromkeys(VARIANTS, lambda: prefill(self.model, prompt))
        self._turns(steps, 1, f"warm-up, {length} tokens")
        timings = self._turns(steps, rounds, f"first token after {length}")
        return row(f"first token after {length}", 1, length, timings)

    def decode(self, batch: int, tokens: int) -> Row:
        prompt = random_prompt(self.model, batch, self.shape.decode_prompt)
        sessions, steps = {}, {}
        for name in VARIANTS:
            self.hooks.set(name == "hooked")
            sessions[name] = Session(self.model, prompt, tokens)
            steps[name] = sessions[name].captured()
        same = check_steps(self.model, self.hooks, steps, sessions)
        timings = self._turns(steps, tokens, f"decoding, batch {batch}")
        found = row(f"decode after {self.shape.decode_prompt}", batch, batch, timings)
        read = bytes_read(self.model)
        for name in VARIANTS:
            speed = read / timings[name].median
            found[f"{name}_gb_s"] = speed / 1e9
            found[f"{name}_bandwidth_share"] = speed / self.bandwidth
            read += self.hooks.bytes_read()
        return found | {"same_tokens_checked": same}


def row(case: str, batch: int, tokens: int, timings: dict[str, Timings]) -> Row:
    """One line: milliseconds, tokens a second, and the ratio of speeds, hooked to unhooked. tokens:
    of one call."""
    ratio, spread = timings["unhooked"].over(timings["hooked"])
    found: Row = {"case": case, "batch": batch, "pairs": len(timings["hooked"].seconds)}
    for name in VARIANTS:
        found[f"{name}_ms"] = timings[name].median * 1e3
        found[f"{name}_spread"] = timings[name].spread
        found[f"{name}_tokens_s"] = tokens / timings[name].median
    best = timings["unhooked"].best / timings["hooked"].best
    return found | {"ratio": ratio, "ratio_spread": spread, "ratio_of_best": best}


def synthetic(model: Any, shape: Shape, gate: str, edits: int, rank: int | None) -> Synthetic:
    """Edits of a gate; rank None: a dense Δ."""
    if gate == "memory":
        return SyntheticMemory(model, edits)
    return SyntheticHooks(model, shape.hooked_layers, gate, edits, rank)


def table_of(result: dict[str, Any]) -> Table:
    memory = result["peak_memory_gb"]
    table = Table(
        title=f"{result['model']}, {result['gate']} gate, {result['edits']} edits, Δ "
        f"{result['delta']}, layers {result['layers']}",
        caption=f"{result['device']}, {result['threads']} threads; copy "
        f"{result['copy_gb_s']:.1f} GB/s; peak memory {memory['unhooked']:.2f} GB, hooked "
        f"{memory['hooked']:.2f} GB; ± is the interquartile range",
    )
    table.add_column("case")
    times = ("batch", "unhooked ms", "hooked ms", "unhooked tok/s", "hooked tok/s")
    for name in (*times, "ratio", "±", "of best", "GB/s", "of copy"):
        table.add_column(name, justify="right")
    for line in result["rows"]:
        speed, share = line.get("hooked_gb_s"), line.get("hooked_bandwidth_share")
        table.add_row(
            line["case"],
            str(line["batch"]),
            *(f"{line[f'{name}_ms']:.2f}" for name in VARIANTS),
            *(f"{line[f'{name}_tokens_s']:.1f}" for name in VARIANTS),
            f"{line['ratio']:.3f}",
            f"{line['ratio_spread']:.3f}",
            f"{line['ratio_of_best']:.3f}",
            "" if speed is None else f"{speed:.1f}",
            "" if share is None else f"{share:.0%}",
        )
    return table


def main(
    model: str = "smollm2",
    shape: Annotated[str | None, typer.Option(help=f"random weights: {', '.join(SHAPES)}")] = None,
    gate: Annotated[str, typer.Option(help=", ".join(GATES))] = "keyed",
    edits: int = 1000,
    dense: Annotated[bool, typer.Option("--dense/--factored")] = True,
    rank: Annotated[int, typer.Option(help="rank of a factored Δ")] = 128,
    rounds: Annotated[int, typer.Option(help="pairs of passes a prompt length")] = 15,
    tokens: Annotated[int, typer.Option(help="pairs of decoded tokens")] = 64,
    threads: Threads = None,
    json_to: JsonTo = None,
) -> None:
    """Measure a model with and without synthetic edits."""
    if gate not in GATES or (shape is not None and shape not in SHAPES):
        raise typer.BadParameter(f"gate {gate!r} or shape {shape!r} is not one of those offered")
    use_threads(threads)
    torch.manual_seed(0)
    device = main_device()
    chosen = SHAPES[shape] if shape else LOADED
    messages = Console(stderr=True)
    with torch.inference_mode(), Progress(console=messages, transient=True) as progress:
        built = build(model, chosen, device)
        longest = random_prompt(built, 1, max(chosen.prompts))
        prefill(built, longest)
        memory = {"unhooked": peak_memory(device) / 1e9}
        hooks = synthetic(built, chosen, gate, edits, None if dense else rank)
        with hooks.attached():
            prefill(built, longest)
        memory["hooked"] = peak_memory(device) / 1e9
        with only_right_results(messages):
            check(built, hooks, longest[:, : min(chosen.prompts)])
            run = Run(built, chosen, hooks, progress)
            rows = [run.first_token(length, rounds) for length in chosen.prompts]
            batches = (1, 16) if device.type == "cuda" else (1, 4)
            rows += [run.decode(batch, tokens) for batch in batches]
    result = {
        "model": shape or model,
        "device": device_name(),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        **machine(),
        "dtype": str(built.dtype).removeprefix("torch."),
        "gate": gate,
        "edits": edits,
        "delta": "none" if gate == "memory" else "dense" if dense else f"rank {rank}",
        "layers": ", ".join(map(str, hooks.layers)),
        "hook_bytes": hooks.bytes_held(),
        "peak_memory_gb": memory,
        "copy_gb_s": run.bandwidth / 1e9,
        "rows": rows,
    }
    put(result, table_of(result), json_to)


if __name__ == "__main__":
    run_script(main)
