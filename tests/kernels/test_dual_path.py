"""The dual path in two launches against float64: on a GPU where there is one, else interpreted."""

from collections.abc import Iterator

import pytest
import torch

from coachhook_kernels import Delta, TokenGate
from coachhook_kernels.hook_linear import reference as per_token
from coachhook_kernels.hook_linear_sequence import reference
from tests.support.dual_path import (
    Layer,
    between,
    check_output,
    check_score,
    check_sequence,
    random,
    score_bound,
)
from tests.support.kernels import DEVICE

pytest.importorskip("triton")

from coachhook_kernels.dual_path import configs, kernel

pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning")]
if DEVICE == "cuda":
    pytestmark.append(pytest.mark.gpu)

HALF, SINGLE = torch.bfloat16, torch.float32
dtypes = pytest.mark.parametrize("dtype", [SINGLE, HALF, torch.float16], ids=str)
ranks = pytest.mark.parametrize("rank", [None, 1, 5], ids=lambda rank: f"rank{rank}")
layouts = pytest.mark.parametrize("layout", ["linear", "conv1d"])


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    # In this mode torch fills what `empty` returns with NaN, or the greatest integer.
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    assert torch.ones(1).new_empty(3, dtype=HALF).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _two_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where one would do, which test_dual_path_meeting.py is about."""
    monkeypatch.setattr(configs, "meeting_config", lambda *_: None)


class TestProducts:
    @dtypes
    @ranks
    @pytest.mark.parametrize("rows", [1, 2, 15, 16, 17, 33])
    def test_odd_shapes(self, rows: int, rank: int | None, dtype: torch.dtype) -> None:
        layer = Layer(37, 23, dtype, rank)
        keys = random(rows, 37, seed=5, dtype=dtype)
        if rank is None:
            found = kernel.dense_products(keys, layer.weight, layer.bias, layer.delta.down)
        else:
            found = kernel.factored_products(keys, layer.weight, layer.bias, layer.delta.down)
        assert not found.squares.isnan().any()
        assert not found.delta_keys.isnan().any()
        check_output(found.output, layer, keys, torch.zeros(rows, 1, device=DEVICE).bool()[:, 0])
        check_score(found.squares.sum(0).sqrt(), layer, keys)
        projected = layer.double().delta.project(keys.double())
        bound = torch.finfo(found.delta_keys.dtype).eps * projected.abs().max() + 1e-4
        assert (found.delta_keys - projected).abs().max() <= bound

    @layouts
    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize(("d_in", "d_out"), [(1, 1), (1, 40), (300, 1), (129, 65), (64, 32)])
    @pytest.mark.parametrize("rows", [1, 9, 20])
    def test_layers(self, rows: int, d_in: int, d_out: int, bias: bool, layout: str) -> None:
        keys = random(1, rows, d_in, seed=5, dtype=HALF)
        check_sequence(Layer(d_in, d_out, HALF, None, layout, bias), keys, None, 0.4)

    @pytest.mark.parametrize("dtype", [SINGLE, HALF], ids=str)
    @pytest.mark.parametrize("factored", [True, False])
    def test_every_tile(
        self, factored: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        width = "single" if dtype == SINGLE else "half"
        for config in configs.FEW_ROWS[width] + configs.MANY_ROWS[width]:
            # Two tiles, the second one not full, in each direction.
            rank = config["BN"] + 3 if factored else None
            layer = Layer(140, config["BN"] + 11, dtype, rank, "conv1d")
            keys = random(1, config["BT"] + 13, 140, seed=5, dtype=dtype)
            monkeypatch.setattr(configs, "product_config", lambda *_, found=config, **__: found)
            assert check_sequence(layer, keys, None, 0.2).any()

    @ranks
    def test_strided_keys(self, rank: int | None) -> None:
        layer = Layer(24, 20, HALF, rank)
        wide = random(2, 9, 48, seed=5, dtype=HALF)
        turned = random(9, 2, 48, seed=5, dtype=HALF).transpose(0, 1)
        for keys in (wide[..., :24], wide[..., ::2], turned[..., 7:31]):
            assert not keys.is_contiguous()
            check_sequence(layer, keys, None, 0.3)

    def test_default_tiles_grow_with_the_rows(self) -> None:
        def tile(n_tokens: int, d_out: int = 4096) -> tuple[int, int]:
            # Four multiprocessors, whatever this machine has.
            config = configs.default_config(n_tokens, d_out, 0, HALF, True, torch.device("cpu"))
            return config["BT"], config["BN"]

        heights = [tile(rows)[0] for rows in (1, 16, 17, 32, 33, 64, 65, 1024)]
        assert heights == [16, 16, 32, 32, 64, 64, 128, 128]
        assert tile(16, d_out=16)[1] == 16

    def test_a_conv1d_keeps_to_the_tiles_that_do_not_spill(self) -> None:
        device = torch.device("cpu")
        rows = configs.default_config(4096, 4096, 0, HALF, True, device)
        columns = configs.default_config(4096, 4096, 0, HALF, False, device)
        assert rows["BT"] * rows["BN"] > configs.COLUMN_MAJOR_TILE
        assert columns["BT"] * columns["BN"] == configs.COLUMN_MAJOR_TILE


class TestSequences:
    @dtypes
    @ranks
    @pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
    def test_open_none_and_mixed(self, share: float, rank: int | None, dtype: torch.dtype) -> None:
        keys = random(2, 13, 37, seed=6, dtype=dtype)
        is_open = check_sequence(Layer(37, 23, dtype, rank), keys, None, share)
        assert is_open.any() == (share > 0)
        assert is_open.all() == (share == 1)

    @ranks
    @pytest.mark.parametrize("side", ["left", "right", "holes"])
    def test_padding(self, side: str, rank: int | None) -> None:
        lengths = torch.tensor([19, 1, 0, 7, 18], device=DEVICE)
        keys = random(5, 19, 30, seed=7, dtype=HALF)
        position = torch.arange(19, device=DEVICE)
        mask = position < lengths[:, None]
        if side == "left":
            mask = mask.flip(1)
        elif side == "holes":
            mask = random(5, 19, seed=8, dtype=SINGLE) > 0
        # Whatever stands in the padding counts for nothing.
        keys[~mask] = float("inf")
        layer = Layer(30, 70, HALF, rank)
        exact = layer.double()
        safe = torch.where(mask.unsqueeze(-1), keys, 0)
        _, _, expected = reference.hook_linear_sequence(
            safe.double(), exact.weight, exact.bias, exact.delta, mask, torch.tensor(0.0)
        )
        alpha = between(expected, 0.3)
        output, _, z = kernel.linear_sequence(
            keys, layer.weight, layer.bias, layer.delta, mask, alpha
        )
        assert torch.equal(z >= alpha, expected >= alpha)
        assert torch.equal(z.isnan(), expected.isnan())
        check_output(output[mask], layer, keys[mask], (expected >= alpha)[mask])

    def test_lone_tokens_never_open(self) -> None:
        keys = random(4, 1, 20, seed=9, dtype=SINGLE)
        layer = Layer(20, 30, SINGLE)
        alpha = torch.tensor(-1e6, device=DEVICE)
        output, score, z = kernel.linear_sequence(
            keys, layer.weight, layer.bias, layer.delta, None, alpha
        )
        assert z.isnan().all()
        check_score(score, layer, keys)
        check_output(output, layer, keys, torch.zeros_like(score).bool())

    @ranks
    def test_statistics_span_blocks(
        self, rank: int | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        shortest = configs.FINISH_LENGTHS[0]
        monkeypatch.setattr(configs, "FINISH_LENGTHS", (shortest,))
        n_tokens = 5 * shortest + 6
        keys = random(2, n_tokens, 8, seed=10, dtype=SINGLE)
        mask = torch.ones(2, n_tokens, dtype=torch.bool, device=DEVICE)
        # No real token in the first block of the second sequence.
        mask[1, :shortest] = False
        mask[0, 2 * shortest + 3 : 3 * shortest] = False
        assert check_sequence(Layer(8, 12, SINGLE, rank), keys, mask, 0.1).any()

    @dtypes
    @ranks
    def test_composed_of_library_products(
        self, rank: int | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(configs, "COMPOSED_ROWS", 1)
        keys = random(2, 21, 37, seed=11, dtype=dtype)
        check_sequence(Layer(37, 1100, dtype, rank), keys, None, 0.3, rounded=dtype != SINGLE)

    def test_large_offset_of_the_norms(self) -> None:
        # Norms of 1000 ± 0.1: their squares would lose the deviation in float32.
        keys = torch.ones(1, 40, 1, device=DEVICE) * 1000
        keys += 0.1 * random(1, 40, 1, seed=12, dtype=SINGLE)
        layer = Layer(1, 1, SINGLE)
        layer.delta = Delta(torch.ones(1, 1, device=DEVICE))
        check_sequence(layer, keys, None, 0.3)


class TestCalibrated:
    @dtypes
    @pytest.mark.parametrize(
        ("rows", "layout"),
        [
            *((1, "linear"), (3, "conv1d"), (16, "linear"), (17, "conv1d")),
            *((90, "linear"), (90, "conv1d")),
        ],
    )
    @pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
    def test_against_the_token_gate(
        self, share: float, rows: int, layout: str, dtype: torch.dtype
    ) -> None:
        layer = Layer(37, 150, dtype, None, layout)
        keys = random(rows, 37, seed=13, dtype=dtype)
        exact = layer.double()
        mean, std = torch.tensor(40.0, device=DEVICE), torch.tensor(3.0, device=DEVICE)
        norms = exact.delta.project(keys.double()).norm(dim=-1)
        alpha = between((norms - mean) / std, share)
        output, score, _ = kernel.dual_path_calibrated(
            keys, layer.weight, layer.bias, layer.delta.down, mean, std, alpha
        )
        gate = TokenGate(mean, std, alpha)
        is_open = gate.is_open(norms)
        assert torch.equal(gate.is_open(score), is_open)
        check_score(score, layer, keys)
        check_output(output, layer, keys, is_open)
        plain, _, _ = per_token.hook_linear(
            keys.double(), exact.weight, exact.bias, exact.delta, gate
        )
        assert torch.equal(plain, exact.forward(keys.double(), is_open))

    @dtypes
    def test_composed_of_library_products(
        self, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(configs, "COMPOSED_ROWS", 1)
        layer = Layer(37, 1100, dtype)
        keys = random(21, 37, seed=13, dtype=dtype)
        norms = layer.double().delta.project(keys.double()).norm(dim=-1)
        scalars = (torch.tensor(200.0, device=DEVICE), torch.tensor(9.0, device=DEVICE))
        gate = TokenGate(*scalars, between((norms - scalars[0]) / scalars[1], 0.3))
        is_open = gate.is_open(norms)
        output, score, index = kernel.dual_path_calibrated(
            keys, layer.weight, layer.bias, layer.delta.down, *gate[:3]
        )
        # The library rounds `Δ k` to nearest, and a norm moves no further than its vector.
        allowed = score_bound(layer, keys) + torch.finfo(dtype).eps / 2 * norms
        assert ((score - norms).abs() <= allowed).all()
        assert is_open.any()
        assert not is_open.all()
        assert torch.equal(gate.is_open(score), is_open)
        assert torch.equal(index, torch.full_like(index, -1))
        check_output(output, layer, keys, is_open)

    def test_nan_stays_closed(self) -> None:
        layer = Layer(5, 4, SINGLE)
        keys = random(3, 5, seed=14, dtype=SINGLE)
        keys[1, 2] = float("nan")
        scalars = [torch.tensor(value, device=DEVICE) for value in (0.0, 1.0, -1.0)]
        output, score, _ = kernel.dual_path_calibrated(
            keys, layer.weight, layer.bias, layer.delta.down, *scalars
        )
        assert torch.equal(score.isnan(), torch.tensor([False, True, False], device=DEVICE))
        rest = torch.tensor([0, 2], device=DEVICE)
        check_output(output[rest], layer, keys[rest], torch.ones(2, device=DEVICE).bool())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestOnAGPU:
    @ranks
    @pytest.mark.parametrize("rows", [1, 16, 40, 130, 512, 2048])
    def test_large_layers(self, rows: int, rank: int | None) -> None:
        layer = Layer(2048, 4096, HALF, rank)
        keys = random(1, rows, 2048, seed=15, dtype=HALF)
        check_sequence(layer, keys, None, 0.05, rounded=rows >= configs.COMPOSED_ROWS)

    def test_graph_replay_follows_its_inputs(self) -> None:
        layer = Layer(512, 640, HALF)
        keys = random(2, 8, 512, seed=16, dtype=HALF)
        alpha = torch.tensor(0.5, device=DEVICE)
        arguments = (layer.weight, layer.bias, layer.delta, None, alpha)
        kernel.linear_sequence(keys, *arguments)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = kernel.linear_sequence(keys, *arguments)
        keys.copy_(random(2, 8, 512, seed=17, dtype=HALF))
        graph.replay()
        for got, expected in zip(captured, kernel.linear_sequence(keys, *arguments), strict=True):
            assert torch.equal(got, expected)
