"""The second moment of keys beside cuBLAS's product of them: `pytest bench --benchmark-only`.

`product` (`torch.mm`, both triangles, nothing added) is the baseline of each group. `stream` is one
of many calls into one moment, `single` a call that mirrors too; `accumulate` is the plain torch
reference. Widths are `d_in` of SmolLM2-135M, with 192 on a CPU and the larger models on a GPU.
`extra_info` holds the operations of a full product, for a rate.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.harness.rounds import DEVICE, GPU, time_rounds
from bench.ops.layers import require_close
from bench.ops.tensor_core import cut_off
from coachhook_kernels.key_covariance import key_covariance_, mirror_
from coachhook_kernels.key_covariance.reference import key_covariance_ as accumulate_

WIDTHS = [1536, 4096, 6400, 14336, 16384] if GPU else [192, 1536]
ROWS = [1024, 4096, 16384] if GPU else [256]
DTYPES = [torch.bfloat16, torch.float32] if GPU else [torch.float32]
CHECKED = 2048


def product(moment: Tensor, keys: Tensor) -> Tensor:
    return torch.mm(keys.mT, keys)


def stream(moment: Tensor, keys: Tensor) -> Tensor:
    return key_covariance_(moment, keys, mirror=False)


STEPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "product": product,
    "accumulate": accumulate_,
    "stream": stream,
    "single": key_covariance_,
}


def check(what: str, keys: Tensor) -> None:
    """Check one step against float64, on at most `CHECKED` columns, since float64 is slow."""
    d = keys.shape[1]
    found = STEPS[what](torch.zeros(d, d, device=keys.device), keys)
    if what == "stream":
        mirror_(found)
    if what != "product":
        assert torch.equal(found, found.mT)
    some = keys[:, -CHECKED:]
    plain = (
        torch.mm(some.mT, some) if what == "product" else torch.mm(some.mT.float(), some.float())
    )
    exact = torch.mm(some.mT.double(), some.double())
    # The other two are torch's own products, which are compared with themselves.
    cut = cut_off(keys) if what in ("stream", "single") else 0.0
    require_close(what, found[-CHECKED:, -CHECKED:], plain, exact, cut)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("d", WIDTHS)
@pytest.mark.parametrize("what", STEPS)
def test_key_covariance(benchmark: Any, what: str, d: int, rows: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    keys = torch.randn(rows, d, device=DEVICE).to(dtype)
    check(what, keys)
    moment = torch.zeros(d, d, device=DEVICE)
    group = f"{d} wide, {rows} rows, {dtype}"
    time_rounds(benchmark, group, lambda: STEPS[what](moment, keys))
    benchmark.extra_info["operations_a_call"] = 2 * rows * d * d
