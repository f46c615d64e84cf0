"""The update of one layer by one batch, against a direct solve; and how accurate it stays.

    python -m bench.editing.update [--d-in 6400] [--keys 100] [--json PATH or -]

The baseline is `torch.linalg.solve` in float64 of `C_accu X = K₂`, with the matrix already built;
ours is `solve`, with its check on probes, and `absorb` of the same keys. Both must agree before
they are timed in turns. Then come 200 consecutive batches in a smaller layer, each against its own
direct solve. If the float64 update is off by more than 10⁻⁶ in either part, the script ends with
exit code 1. Moments and keys are synthetic: eigenvalues that span 10⁶, keys in narrow clusters,
some of them repeated.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from bench.harness.machine import device_name, machine, main_device, use_threads
from bench.harness.output import put
from bench.harness.script import JsonTo, Threads, WrongResultError, only_right_results, run_script
from bench.harness.timing import matmul_rate, take_turns
from coachhook.editing.inverse import Earlier, RecursiveInverse

PRESERVATION = 150.0
TOLERANCE = 1e-6
RANK = 64


@dataclass
class Layer:
    """A synthetic layer: its moment, the centres of its clusters of keys, and the keys so far."""

    moment: Tensor
    centres: Tensor
    scale: Tensor
    earlier: list[Tensor]
    accumulated: Tensor
    generator: torch.Generator

    @classmethod
    def of(cls, d_in: int, device: torch.device) -> "Layer":
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(device)

        # Channels of very different sizes, and a few strong directions across all of them.
        scale = torch.logspace(0, -3, d_in, dtype=torch.float64, device=device)
        strong = normal(RANK, d_in) * scale
        moment = strong.T @ strong
        moment.diagonal().add_(scale.square())
        accumulated = PRESERVATION * moment
        # The ridge that the update adds too; without it the two would solve different systems.
        accumulated.diagonal().add_(1e-5 * accumulated.diagonal().mean())
        return cls(moment, 2 * normal(20, d_in) * scale, scale, [], accumulated, generator)

    def batch(self, n_keys: int) -> Tensor:
        """New keys `(c, d_in)`, a quarter of which are keys of the batch before."""
        pick = torch.randint(len(self.centres), (n_keys,), generator=self.generator)
        noise = torch.randn(
            n_keys, len(self.scale), generator=self.generator, dtype=torch.float64
        ).to(self.scale)
        keys = 0.3 * noise * self.scale + self.centres[pick.to(self.scale.device)]
        if self.earlier:
            keys[: n_keys // 4] = self.earlier[-1][: n_keys // 4]
        return keys

    def keep(self, keys: Tensor) -> None:
        self.accumulated.addmm_(keys.T, keys)
        self.earlier.append(keys)

    def inverse(self, dtype: torch.dtype = torch.float64) -> RecursiveInverse:
        return RecursiveInverse(
            self.moment, PRESERVATION, lambda: Earlier(self.earlier), dtype=dtype
        )


def compare_speed(
    d_in: int, n_keys: int, rounds: int, device: torch.device, advance: Callable[[], object]
) -> dict[str, Any]:
    """Seconds of both, their ratio, and their operations a second against a large product's."""
    layer = Layer.of(d_in, device)
    solver, keys = layer.inverse(), layer.batch(n_keys)
    solution = solver.solve(keys, fit=1.0)
    layer.keep(keys)
    error = _relative(solution.T, torch.linalg.solve(layer.accumulated, keys.T))
    if not error <= TOLERANCE:
        raise WrongResultError(f"the update differs from the direct solve by {error:.1e}")

    def update() -> None:
        solver.solve(keys, fit=1.0)
        solver.absorb(keys)

    # The keys of the solve above count as absorbed from here on, and again in every round.
    solver.absorb(keys)
    steps = {"direct": lambda: torch.linalg.solve(layer.accumulated, keys.T), "update": update}

    def before(name: str) -> None:
        if name == "update":
            layer.earlier.append(keys)
        advance()

    timings = take_turns(steps, rounds, device, before)
    ratio, spread = timings["direct"].over(timings["update"])
    operations = {
        "direct": 2 / 3 * d_in**3 + 2 * d_in**2 * n_keys,
        "update": 3 * d_in**2 * n_keys,
    }
    rate = matmul_rate(device, torch.float64)
    found: dict[str, Any] = {
        "d_in": d_in,
        "keys": n_keys,
        "rounds": rounds,
        "update_speedup": ratio,
        "update_speedup_spread": spread,
        "update_speedup_of_best": timings["direct"].best / timings["update"].best,
        "operations_ratio": operations["direct"] / operations["update"],
        "difference": error,
        "matmul_gflop_s": rate / 1e9,
    }
    for name, timing in timings.items():
        found[f"{name}_seconds"] = timing.median
        found[f"{name}_gflop_s"] = operations[name] / timing.median / 1e9
        found[f"{name}_rate_share"] = operations[name] / timing.median / rate
    return found


def compare_accuracy(
    d_in: int,
    n_keys: int,
    batches: int,
    dtype: torch.dtype,
    device: torch.device,
    advance: Callable[[], object],
) -> float:
    """Relative error of Δ after so many batches, one random residual of 16 numbers for each key."""
    layer = Layer.of(d_in, device)
    solver = layer.inverse(dtype)
    got = want = torch.zeros((), dtype=torch.float64, device=device)
    for _ in range(batches):
        keys = layer.batch(n_keys)
        residuals = torch.randn(n_keys, 16, generator=layer.generator, dtype=torch.float64)
        solution = solver.solve(keys, fit=1.0)
        layer.keep(keys)
        solver.absorb(keys)
        got = got + residuals.to(device).T @ solution
        want = want + torch.linalg.solve(layer.accumulated, keys.T @ residuals.to(device)).T
        advance()
    return _relative(got, want)


def _relative(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


def measure(
    *,
    d_in: int = 6400,
    n_keys: int = 100,
    rounds: int = 5,
    accuracy_d_in: int = 1536,
    batches: int = 200,
    messages: Console | None = None,
) -> dict[str, Any]:
    """ "update_speedup", "update_error" and their details; on a GPU if there is one.

    Raises `WrongResultError` if the float64 update is not within 10⁻⁶ of the direct solution.
    """
    device = main_device()
    with (
        torch.inference_mode(),
        Progress(console=messages or Console(stderr=True), transient=True) as progress,
    ):
        task = progress.add_task("update", total=2 * rounds)
        found = compare_speed(d_in, n_keys, rounds, device, partial(progress.advance, task))
        errors = {}
        for dtype in (torch.float64, torch.float32):
            name = str(dtype).removeprefix("torch.")
            task = progress.add_task(f"accuracy, {name}", total=batches)
            errors[name] = compare_accuracy(
                accuracy_d_in, n_keys, batches, dtype, device, partial(progress.advance, task)
            )
    if not errors["float64"] <= TOLERANCE:
        raise WrongResultError(f"after {batches} batches Δ is off by {errors['float64']:.1e}")
    return found | {
        "update_error": errors["float64"],
        "update_error_float32": errors["float32"],
        "accuracy_d_in": accuracy_d_in,
        "batches": batches,
        "device": device_name(),
        **machine(),
    }


def table_of(result: dict[str, Any]) -> Table:
    table = Table(
        title=f"update of one layer, d_in {result['d_in']}, {result['keys']} keys, float64",
        caption=f"{result['device']}, {result['threads']} threads; a large product "
        f"{result['matmul_gflop_s']:.0f} GFLOP/s; after {result['batches']} batches of "
        f"{result['keys']} keys at d_in {result['accuracy_d_in']} Δ is off by "
        f"{result['update_error']:.1e} (float32: {result['update_error_float32']:.1e})",
    )
    for name in ("", "ms", "GFLOP/s", "of product", "ratio", "±", "of best", "by operations"):
        table.add_column(name, justify="right" if name else "left")
    for name in ("direct", "update"):
        ratios = (
            "update_speedup",
            "update_speedup_spread",
            "update_speedup_of_best",
            "operations_ratio",
        )
        table.add_row(
            name,
            f"{result[f'{name}_seconds'] * 1e3:.1f}",
            f"{result[f'{name}_gflop_s']:.1f}",
            f"{result[f'{name}_rate_share']:.0%}",
            *(f"{result[ratio]:.1f}" if name == "update" else "" for ratio in ratios),
        )
    return table


def main(
    d_in: int = 6400,
    keys: Annotated[int, typer.Option(help="keys of a batch")] = 100,
    rounds: int = 5,
    accuracy_d_in: int = 1536,
    batches: int = 200,
    threads: Threads = None,
    json_to: JsonTo = None,
) -> None:
    """Measure the update's speed and accuracy."""
    use_threads(threads)
    messages = Console(stderr=True)
    with only_right_results(messages):
        result = measure(
            d_in=d_in,
            n_keys=keys,
            rounds=rounds,
            accuracy_d_in=accuracy_d_in,
            batches=batches,
            messages=messages,
        )
    put(result, table_of(result), json_to)


if __name__ == "__main__":
    run_script(main)
