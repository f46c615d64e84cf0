"""The memory readout beside its reference in plain torch: `pytest bench --benchmark-only`.

`plain torch` is the baseline of each group, `plain torch, compiled` the same under `torch.compile`
(on a GPU). The gate over fingerprints of 1,000 to 100,000 entries, three each; the addition with
every token closed and with one in 16 open; and both in the FFN of a block, whose baseline is the
FFN alone. Widths are SmolLM2-135M's and, on a GPU, those of models of up to 70B. Small sets of
tensors stay in the last cache, which `bench.ops.table` does not let them.
"""

from typing import Any

import pytest
import torch

from bench.harness.rounds import CALLS, DEVICE, GPU, time_rounds
from bench.ops import memory
from bench.ops.cases import FFN, WIDTHS, Case, contenders
from bench.ops.layers import SKETCH

ROWS = [1, 16, 128, 1024, 4096] if GPU else [1, 16, 128]
ENTRIES = [1000, 10_000, 100_000] if GPU else [1000]
DTYPES = [torch.bfloat16, torch.float16, torch.float32] if GPU else [torch.float32]
OPEN = {"all closed": 0, "one in 16 open": 16}
LAYERS = [FFN] if GPU else [(576, 1536)]
PLAIN = [memory.PLAIN, f"{memory.PLAIN}, compiled"] if GPU else [memory.PLAIN]


def measure(benchmark: Any, case: Case, contender: str) -> None:
    """Check, then time one contender."""
    torch.manual_seed(0)
    with torch.no_grad():
        step = contenders(case, torch.device(DEVICE), check=True)[contender]
    group = f"{case.op}, {case.name}, {case.d_in} wide, {case.rows} rows, {case.dtype}"
    time_rounds(benchmark, group, step)
    if benchmark.stats is None:
        return
    moved, operations = case.baseline_work if contender == "FFN" else case.work
    seconds = benchmark.stats.stats.median / CALLS
    benchmark.extra_info |= {"GB/s": moved / seconds / 1e9, "TFLOP/s": operations / seconds / 1e12}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("entries", ENTRIES)
@pytest.mark.parametrize("d", WIDTHS if GPU else WIDTHS[:1])
@pytest.mark.parametrize("contender", [*PLAIN, memory.GATE])
def test_gate(
    benchmark: Any, contender: str, d: int, entries: int, rows: int, dtype: torch.dtype
) -> None:
    case = Case(f"{entries:,} entries", memory.GATE, d, SKETCH, rows, edits=entries,
                dtype=dtype)  # fmt: skip
    measure(benchmark, case, contender)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("share", OPEN)
@pytest.mark.parametrize("d", WIDTHS if GPU else WIDTHS[:1])
@pytest.mark.parametrize("contender", [*PLAIN, memory.ADD])
def test_add(
    benchmark: Any, contender: str, d: int, share: str, rows: int, dtype: torch.dtype
) -> None:
    n_open = rows // OPEN[share] if OPEN[share] else 0
    case = Case(share, memory.ADD, d, d, rows, n_open=n_open, dtype=dtype)
    measure(benchmark, case, contender)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("entries", ENTRIES[1:] or ENTRIES)
@pytest.mark.parametrize(("d", "inner"), LAYERS)
@pytest.mark.parametrize("contender", ["FFN", f"FFN, {memory.LAYER}"])
def test_layer(benchmark: Any, contender: str, d: int, inner: int, entries: int, rows: int) -> None:
    case = Case(f"{entries:,} entries", memory.LAYER, d, inner, rows, edits=entries,
                dtype=DTYPES[0])  # fmt: skip
    measure(benchmark, case, contender)
