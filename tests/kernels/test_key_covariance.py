"""`key_covariance_`: its tiles of one triangle, its mirror, its choice of a way."""

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.ops.tensor_core import truncation
from coachhook_kernels.key_covariance import (
    configs,
    key_covariance_,
    mirror_,
    op,
    reference,
)

kernel = pytest.importorskip("coachhook_kernels.key_covariance.kernel", exc_type=ImportError)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WIDTHS = [1, 7, 64, 130, 257]
ROWS = [0, 1, 17, 300]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SMALL = {
    "triangle": 1,
    "tma": 0,
    "block_i": 32,
    "block_j": 64,
    "block_n": 32,
    "group": 2,
    "num_warps": 4,
    "num_stages": 2,
}


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def accumulator(d: int, seed: int = 9) -> Tensor:
    """A symmetric float32 `(d, d)` with nothing zero."""
    half = random(d, d, seed=seed)
    return half + half.mT


def some(n: int) -> Tensor:
    return random(n, seed=5) > 0


def below_poisoned(moment: Tensor) -> Tensor:
    """`moment` with NaN below the diagonal, where nobody may look."""
    lower = torch.ones_like(moment, dtype=torch.bool).tril(-1)
    return moment.masked_fill(lower, torch.nan)


def check(
    got: Tensor,
    start: Tensor,
    keys: Tensor,
    mask: Tensor | None,
    truncating: bool = DEVICE == "cuda",
) -> None:
    """`got` against float64, beside what torch makes of the same problem in float32.

    truncating: 16-bit keys may have been multiplied by tensor cores.
    """
    kept = (keys if mask is None else keys[mask]).double()
    want = start.double() + kept.mT @ kept
    torch_error = (start + kept.float().mT @ kept.float() - want).abs().max()
    # torch may hit a small sum exactly: either has one rounding of a sum of this size to spare.
    size = (start.double().abs() + kept.abs().mT @ kept.abs()).max()
    bound = 2 * torch_error + torch.finfo(torch.float32).eps * size
    if truncating and keys.dtype.itemsize == 2:
        bound += truncation(keys.shape[0], kernel.SPAN) * size
    assert torch.equal(got, got.mT)
    assert (got - want).abs().max() <= bound


class TestTriangle:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize(("d", "n"), [*product(WIDTHS, ROWS)])
    def test_adds_to_the_upper_triangle_and_mirrors(
        self, d: int, n: int, dtype: torch.dtype
    ) -> None:
        start, keys, mask = accumulator(d), random(n, d, dtype=dtype), some(n)
        got = below_poisoned(start)
        kernel.add_triangle(got, keys, mask, True, SMALL)
        check(got, start, keys, mask)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize(("d", "n"), [*product([16, 144, 272], [1, 17, 300])])
    def test_by_tensor_descriptors(self, d: int, n: int, dtype: torch.dtype) -> None:
        start, keys = accumulator(d), random(n, d, dtype=dtype)
        got = below_poisoned(start)
        kernel.add_triangle(got, keys, None, True, SMALL | {"tma": 1})
        check(got, start, keys, None)

    @pytest.mark.parametrize(
        "config",
        [configs.SQUARE, configs.WIDE, configs.BLACKWELL, configs.POINTER, configs.SINGLE],
        ids=str,
    )
    def test_the_shipped_configurations(self, config: dict[str, int]) -> None:
        dtype = torch.float32 if config is configs.SINGLE else torch.bfloat16
        start, keys = accumulator(400), random(90, 400, dtype=dtype)
        got = below_poisoned(start)
        kernel.add_triangle(got, keys, None, True, config)
        check(got, start, keys, None)

    @pytest.mark.parametrize("group", [1, 3, 64])
    @pytest.mark.parametrize("block_j", [32, 64, 128])
    def test_every_tile_is_added_once_in_any_order(self, block_j: int, group: int) -> None:
        start, keys = accumulator(257), random(5, 257, dtype=torch.bfloat16)
        got = start.clone()
        config = SMALL | {"block_j": block_j, "group": group}
        kernel.add_triangle(got, keys, None, True, config)
        check(got, start, keys, None)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("which", ["none given", "all", "none", "one"])
    def test_masks_and_what_masked_rows_hold(self, which: str, dtype: torch.dtype) -> None:
        start, keys = accumulator(130), random(70, 130, dtype=dtype)
        mask = None
        if which != "none given":
            mask = torch.full((70,), which == "all", device=DEVICE)
            mask[33] = which != "none"
            keys[~mask] = torch.tensor([torch.nan, torch.inf], device=DEVICE).repeat(65).to(dtype)
        got = start.clone()
        kernel.add_triangle(got, keys, mask, True, SMALL)
        check(got, start, keys, mask)
        if which == "none":
            assert torch.equal(got, start)

    def test_rows_of_a_larger_tensor(self) -> None:
        whole = random(120, 160, dtype=torch.bfloat16)
        start, keys = accumulator(96), whole[::2, 16:112]
        mask = some(120)[::2]
        for chosen, tma in ((mask, 0), (None, 1)):
            got = start.clone()
            kernel.add_triangle(got, keys, chosen, True, SMALL | {"tma": tma})
            check(got, start, keys, chosen)

    @pytest.mark.parametrize("tma", [0, 1])
    def test_a_stream_mirrors_once(self, tma: int) -> None:
        start, keys = accumulator(144), random(150, 144, dtype=torch.bfloat16)
        got = below_poisoned(start)
        for part in keys.split(40):
            kernel.add_triangle(got, part, None, False, SMALL | {"tma": tma})
        assert got.tril(-1).isnan().sum() == 144 * 143 // 2
        kernel.mirror_upper(got)
        check(got, start, keys, None)

    @pytest.mark.parametrize("span", [32, 64, 96])
    @pytest.mark.parametrize("masked", [False, True])
    @pytest.mark.parametrize("n", [64, 96, 97, 300])
    def test_accumulators_that_are_drained(
        self, n: int, masked: bool, span: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(kernel, "SPAN", span)
        start, keys = accumulator(144), random(n, 144, dtype=torch.bfloat16)
        mask = some(n) if masked else None
        for tma in (0,) if masked else (0, 1):
            got = below_poisoned(start)
            kernel.add_triangle(got, keys, mask, True, SMALL | {"tma": tma})
            check(got, start, keys, mask)

    @pytest.mark.parametrize("d", WIDTHS)
    def test_mirror(self, d: int) -> None:
        start = accumulator(d)
        got = below_poisoned(start)
        kernel.mirror_upper(got)
        assert torch.equal(got, start)


class TestOp:
    @pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
    @pytest.mark.parametrize(("d", "n"), [*product(WIDTHS, ROWS)])
    def test_adds_and_is_symmetric(self, d: int, n: int, dtype: torch.dtype) -> None:
        start, keys, mask = accumulator(d), random(n, d, dtype=dtype), some(n)
        keys[~mask] = torch.nan
        got = start.clone()
        assert key_covariance_(got, keys, mask) is got
        check(got, start, keys, mask)

    @pytest.mark.parametrize("layout", ["strided", "transposed"])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_keys_that_are_not_contiguous(self, dtype: torch.dtype, layout: str) -> None:
        keys = random(60, 140, dtype=dtype)[::2, 3:70]
        if layout == "transposed":
            keys = keys.mT
        start = accumulator(keys.shape[1])
        check(key_covariance_(start.clone(), keys), start, keys, None)

    @pytest.mark.parametrize("accumulator_dtype", [torch.float32, torch.float64], ids=str)
    def test_a_stream_ends_with_one_mirror(self, accumulator_dtype: torch.dtype) -> None:
        keys = random(90, 130, dtype=torch.bfloat16)
        start = accumulator(130).to(accumulator_dtype)
        got = start.clone()
        for part in keys.split(40):
            key_covariance_(got, part, mirror=False)
        assert mirror_(got) is got
        check(got, start, keys, None)

    def test_a_mirror_that_does_not_compile(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from triton.runtime.errors import PTXASError

        def fails(_: Tensor) -> None:
            raise PTXASError("no such instruction")

        monkeypatch.setattr(op.runtime, "triton_runs", lambda *_: True)
        monkeypatch.setattr(op.runtime, "_broken", set())
        monkeypatch.setattr(kernel, "mirror_upper", fails)
        start = accumulator(41)
        for _ in range(2):
            assert torch.equal(mirror_(below_poisoned(start)), start)

    def test_mirror_of_several_blocks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(reference, "_BLOCK", 16)
        start = accumulator(41)
        assert torch.equal(reference.mirror_(below_poisoned(start)), start)

    def test_an_empty_moment_stays_empty(self) -> None:
        empty = torch.zeros(0, 0, device=DEVICE)
        assert key_covariance_(empty, torch.zeros(3, 0, device=DEVICE)).shape == (0, 0)
        assert mirror_(empty).shape == (0, 0)

    def test_no_gradient_flows(self) -> None:
        keys = random(5, 7).requires_grad_()
        assert not key_covariance_(accumulator(7), keys).requires_grad

    @pytest.mark.parametrize("masked", [False, True])
    @pytest.mark.parametrize("mirror", [False, True])
    def test_opcheck(self, mirror: bool, masked: bool) -> None:
        keys = random(5, 7, dtype=torch.bfloat16)
        mask = some(5) if masked else None
        torch.library.opcheck(op._key_covariance_, (accumulator(7), keys, mask, mirror))

    def test_opcheck_of_mirror(self) -> None:
        torch.library.opcheck(op._mirror_, (accumulator(7),))


class TestChoice:
    """What would run on a GPU of 132 multiprocessors, with nothing measured."""

    @pytest.mark.parametrize(
        ("rows", "d", "dtype", "config"),
        [
            (4096, 1536, torch.bfloat16, configs.LIBRARY),
            (4095, 4095, torch.bfloat16, configs.LIBRARY),
            (1023, 4096, torch.bfloat16, configs.LIBRARY),
            (16384, 14336, torch.float32, configs.LIBRARY),
            (1024, 4096, torch.bfloat16, configs.SQUARE),
            (16384, 4096, torch.float16, configs.SQUARE),
            (4096, 14336, torch.bfloat16, configs.SQUARE),
            (16384, 14336, torch.bfloat16, configs.WIDE),
        ],
        ids=str,
    )
    def test_default(self, rows: int, d: int, dtype: torch.dtype, config: dict[str, int]) -> None:
        assert configs.default_config(rows, d, dtype, 132) is config

    def choose(self, monkeypatch: pytest.MonkeyPatch, keys: Tensor, tma: bool, **given: Any) -> Any:
        monkeypatch.setattr(configs, "default_config", lambda *_: configs.SQUARE)
        monkeypatch.setattr(configs, "_has_tma", lambda _: tma)
        tensor_memory = given.get("tensor_memory", False)
        monkeypatch.setattr(configs, "_has_tensor_memory", lambda _: tensor_memory)
        moment = torch.empty(keys.shape[1], keys.shape[1])
        return configs.choose(moment, keys, given.get("mask"))

    def test_descriptors_need_a_gpu_that_has_them_and_no_mask(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        keys = torch.empty(32, 64, dtype=torch.bfloat16)
        mask = torch.ones(32, dtype=torch.bool)
        assert self.choose(monkeypatch, keys, True) is configs.SQUARE
        assert self.choose(monkeypatch, keys, True, mask=mask) is configs.POINTER
        assert self.choose(monkeypatch, keys, False) is configs.POINTER
        assert self.choose(monkeypatch, keys, True, tensor_memory=True) is configs.BLACKWELL

    def test_masked_float32_goes_to_the_library(self, monkeypatch: pytest.MonkeyPatch) -> None:
        mask = torch.ones(32, dtype=torch.bool)
        assert self.choose(monkeypatch, torch.empty(32, 64), False, mask=mask) is configs.LIBRARY
        assert self.choose(monkeypatch, torch.empty(32, 64), False) is configs.POINTER

    @pytest.mark.parametrize(
        "cut",
        [(slice(None), slice(0, 63)), (slice(None), slice(1, 65)), (slice(None), slice(0, 128, 2))],
    )
    def test_rows_that_are_not_aligned_go_to_the_library(
        self, monkeypatch: pytest.MonkeyPatch, cut: tuple[slice, slice]
    ) -> None:
        keys = torch.empty(32, 128, dtype=torch.bfloat16)[cut]
        assert self.choose(monkeypatch, keys, True) is configs.LIBRARY

    def test_a_triangle_is_launched_where_it_is_chosen(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(op.runtime, "triton_runs", lambda *_: True)
        monkeypatch.setattr(op, "choose", lambda *_: SMALL)
        monkeypatch.setattr(op, "_library_", None)
        start, keys = accumulator(130), random(40, 130, dtype=torch.bfloat16)
        got = start.clone()
        key_covariance_(got, keys, mirror=False)
        assert not torch.equal(got, got.mT)
        check(mirror_(got), start, keys, None)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
class TestLarge:
    """The public operation at sizes that go to the triangle, and just below them."""

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("masked", [False, True])
    @pytest.mark.parametrize(("d", "n"), [(4096, 1024), (4096, 1500), (4112, 8200), (4095, 1024)])
    def test_adds_and_is_symmetric(self, d: int, n: int, masked: bool, dtype: torch.dtype) -> None:
        start, keys = accumulator(d), random(n, d, dtype=dtype)
        mask = some(n) if masked else None
        if mask is not None:
            keys[~mask] = torch.nan
        got = start.clone()
        key_covariance_(got, keys, mask)
        check(got, start, keys, mask)
        streamed = below_poisoned(start)
        key_covariance_(streamed, keys, mask, mirror=False)
        check(mirror_(streamed), start, keys, mask)

    def test_a_captured_call_follows_its_inputs(self) -> None:
        keys = random(1024, 4096, dtype=torch.bfloat16)
        moment = torch.zeros(4096, 4096, device=DEVICE)
        key_covariance_(moment, keys)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            key_covariance_(moment, keys)
        start = accumulator(4096)
        moment.copy_(start)
        keys.copy_(random(1024, 4096, seed=3, dtype=torch.bfloat16))
        graph.replay()
        check(moment, start, keys, None)
