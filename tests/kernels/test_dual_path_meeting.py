"""The dual path in one launch against float64: on a GPU where there is one, else interpreted."""

import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from coachhook_kernels import Delta, TokenGate
from coachhook_kernels.hook_linear_sequence import reference
from tests.support.dual_path import (
    Layer,
    between,
    check_output,
    check_score,
    check_sequence,
    random,
)
from tests.support.kernels import DEVICE

pytest.importorskip("triton")

from coachhook_kernels.dual_path import configs, kernel
from coachhook_kernels.launch import counters as workspace

pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning")]
if DEVICE == "cuda":
    pytestmark.append(pytest.mark.gpu)

HALF = torch.bfloat16
dtypes = pytest.mark.parametrize("dtype", [HALF, torch.float16], ids=str)


@pytest.fixture(autouse=True)
def _one_launch(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Memory comes full of NaN, no other kernel runs, and the counters end as they began."""

    def refuse(*_: object) -> None:
        pytest.fail("the tokens took two launches")

    for name in ("dense_products", "factored_products", "composed_products"):
        monkeypatch.setattr(kernel, name, refuse)
    if DEVICE == "cpu":
        # One set, as a stream keeps one, instead of fresh zeros at every launch.
        own = torch.zeros(workspace.SET, dtype=torch.int32)
        monkeypatch.setattr(kernel, "counters", lambda device: own)
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.ones(1).new_empty(3, dtype=HALF).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
    assert not kernel.counters(torch.device(DEVICE, 0)).any()


@dtypes
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("batch", "length"), [(1, 2), (1, 16), (3, 5), (4, 13), (2, 32)])
def test_sequences(batch: int, length: int, share: float, dtype: torch.dtype) -> None:
    keys = random(batch, length, 37, seed=6, dtype=dtype)
    is_open = check_sequence(Layer(37, 23, dtype), keys, None, share)
    assert is_open.any() == (share > 0)
    assert is_open.all() == (share == 1)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layout", ["linear", "conv1d"])
@pytest.mark.parametrize(("d_in", "d_out"), [(1, 1), (1, 40), (300, 1), (129, 65), (64, 32)])
def test_layers(d_in: int, d_out: int, layout: str, bias: bool) -> None:
    keys = random(1, 9, d_in, seed=5, dtype=HALF)
    check_sequence(Layer(d_in, d_out, HALF, None, layout, bias), keys, None, 0.4)


@pytest.mark.parametrize("number", range(len(configs.MEETING)))
def test_every_tile(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configs.MEETING[number]
    monkeypatch.setattr(configs, "meeting_config", lambda *_: config)
    # Three column tiles, the last one not full, and tokens that do not fill theirs.
    layer = Layer(config["BK"] + 12, 2 * config["BN"] + 11, HALF, None, "conv1d")
    keys = random(1, config["BT"] - 3, config["BK"] + 12, seed=5, dtype=HALF)
    assert check_sequence(layer, keys, None, 0.2).any()


@pytest.mark.parametrize("side", ["left", "right", "holes"])
def test_padding(side: str) -> None:
    lengths = torch.tensor([11, 1, 0, 7, 10], device=DEVICE)
    keys = random(5, 11, 30, seed=7, dtype=HALF)
    mask = torch.arange(11, device=DEVICE) < lengths[:, None]
    if side == "left":
        mask = mask.flip(1)
    elif side == "holes":
        mask = random(5, 11, seed=8, dtype=torch.float32) > 0
    # Whatever stands in the padding counts for nothing.
    keys[~mask] = float("inf")
    layer = Layer(30, 70, HALF)
    exact = layer.double()
    safe = torch.where(mask.unsqueeze(-1), keys, 0).double()
    _, _, expected = reference.hook_linear_sequence(
        safe, exact.weight, exact.bias, exact.delta, mask, torch.tensor(0.0)
    )
    alpha = between(expected, 0.3)
    output, _, z = kernel.linear_sequence(keys, layer.weight, layer.bias, layer.delta, mask, alpha)
    assert torch.equal(z >= alpha, expected >= alpha)
    assert torch.equal(z.isnan(), expected.isnan())
    check_output(output[mask], layer, keys[mask], (expected >= alpha)[mask])


def test_lone_tokens_never_open() -> None:
    keys = random(4, 1, 20, seed=9, dtype=HALF)
    layer = Layer(20, 30, HALF)
    alpha = torch.tensor(-1e6, device=DEVICE)
    output, score, z = kernel.linear_sequence(
        keys, layer.weight, layer.bias, layer.delta, None, alpha
    )
    assert z.isnan().all()
    check_score(score, layer, keys)
    check_output(output, layer, keys, torch.zeros_like(score).bool())


def test_strided_keys() -> None:
    layer = Layer(24, 20, HALF)
    wide = random(2, 9, 48, seed=5, dtype=HALF)
    turned = random(9, 2, 48, seed=5, dtype=HALF).transpose(0, 1)
    for keys in (wide[..., :24], wide[..., ::2], turned[..., 7:31]):
        assert not keys.is_contiguous()
        check_sequence(layer, keys, None, 0.3)


def test_large_offset_of_the_norms() -> None:
    # Norms of 1000 and a few steps of 4: their squares would lose the deviation in float32.
    keys = torch.ones(1, 40, 1, device=DEVICE) * 1000
    keys += 4 * random(1, 40, 1, seed=12, dtype=torch.float32).round()
    layer = Layer(1, 1, HALF)
    layer.delta = Delta(torch.ones(1, 1, device=DEVICE, dtype=HALF))
    check_sequence(layer, keys.to(HALF), None, 0.3)


@dtypes
@pytest.mark.parametrize(("rows", "layout"), [(1, "linear"), (3, "conv1d"), (17, "linear")])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_token_gate(share: float, rows: int, layout: str, dtype: torch.dtype) -> None:
    layer = Layer(37, 150, dtype, None, layout)
    keys = random(rows, 37, seed=13, dtype=dtype)
    mean, std = torch.tensor(40.0, device=DEVICE), torch.tensor(3.0, device=DEVICE)
    norms = layer.double().delta.project(keys.double()).norm(dim=-1)
    gate = TokenGate(mean, std, between((norms - mean) / std, share))
    is_open = gate.is_open(norms)
    output, score, index = kernel.dual_path_calibrated(
        keys, layer.weight, layer.bias, layer.delta.down, *gate[:3]
    )
    assert torch.equal(gate.is_open(score), is_open)
    assert torch.equal(index, torch.full_like(index, -1))
    check_score(score, layer, keys)
    check_output(output, layer, keys, is_open)


def test_a_nan_closes_its_own_token_alone() -> None:
    layer = Layer(5, 4, HALF)
    keys = random(3, 5, seed=14, dtype=HALF)
    keys[1, 2] = float("nan")
    scalars = [torch.tensor(value, device=DEVICE) for value in (0.0, 1.0, -1.0)]
    output, score, _ = kernel.dual_path_calibrated(
        keys, layer.weight, layer.bias, layer.delta.down, *scalars
    )
    assert torch.equal(score.isnan(), torch.tensor([False, True, False], device=DEVICE))
    rest = torch.tensor([0, 2], device=DEVICE)
    check_output(output[rest], layer, keys[rest], torch.ones(2, device=DEVICE).bool())


def test_no_more_programs_than_multiprocessors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "multiprocessors", lambda device: 132)

    def tile(rows: int, d_out: int) -> tuple[int, int] | None:
        config = configs.meeting_config(torch.empty(rows, 8, dtype=HALF), d_out)
        return config and (config["BT"], config["BN"])

    widths = [tile(1, d_out) for d_out in (576, 4096, 8192, 8448, 8449)]
    assert widths == [(16, 16), (16, 32), (16, 64), (16, 64), None]
    heights = [tile(rows, 4096) for rows in (16, 17, 33, 64, 65)]
    assert heights == [(16, 32), (32, 32), (64, 32), (64, 32), None]
    assert configs.meeting_config(torch.empty(1, 8), 576) is None
    # One that was measured at 576 columns, with more programs than there may be at 1600.
    narrow = configs.MEETING[0]
    monkeypatch.setattr(configs, "multiprocessors", lambda device: 60)
    monkeypatch.setattr(configs, "lookup", lambda *_, **__: narrow)
    assert tile(1, 576) == (16, 16)
    assert tile(1, 1600) == (16, 32)


WATCHED = """
import torch
from coachhook_kernels.dual_path import kernel
from coachhook_kernels import Delta
torch.manual_seed(0)
with torch.device("cuda"):
    weight, delta = torch.randn(2, 4096, 512, dtype=torch.bfloat16)
    keys, alpha = torch.randn(2, 8, 512, dtype=torch.bfloat16), torch.tensor(0.5)
arguments = (keys, weight, None, Delta(delta), None, alpha)
first = kernel.linear_sequence(*arguments)
torch.cuda.synchronize()
streams = [torch.cuda.Stream(), torch.cuda.Stream()]
for i in range(20):
    found = []
    for j in range(100):
        with torch.cuda.stream(streams[j % 2]):
            found.append(kernel.linear_sequence(*arguments))
    torch.cuda.synchronize()
    for results in found:
        assert all(torch.equal(a, b) for a, b in zip(results, first)), i
"""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestOnAGPU:
    def test_everybody_always_comes(self) -> None:
        """Two streams at a time, in a process that is stopped should a program wait for ever."""
        subprocess.run([sys.executable, "-c", WATCHED], check=True, timeout=300)

    @pytest.mark.parametrize("rows", [1, 16, 33, 64])
    @pytest.mark.parametrize("d_out", [576, 4096, 8192])
    def test_large_layers(self, d_out: int, rows: int) -> None:
        keys = random(1, rows, 2048, seed=15, dtype=HALF)
        if configs.meeting_config(keys[0], d_out) is None:
            pytest.skip("too few multiprocessors")
        check_sequence(Layer(2048, d_out, HALF), keys, None, 0.05)

    def test_graph_replay_follows_its_inputs(self) -> None:
        layer = Layer(512, 640, HALF)
        keys = random(2, 8, 512, seed=16, dtype=HALF)
        alpha = torch.tensor(0.5, device=DEVICE)
        arguments = (layer.weight, layer.bias, layer.delta, None, alpha)
        kernel.linear_sequence(keys, *arguments)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = kernel.linear_sequence(keys, *arguments)
        for seed in (17, 18):
            keys.copy_(random(2, 8, 512, seed=seed, dtype=HALF))
            graph.replay()
            again = kernel.linear_sequence(keys, *arguments)
            for got, expected in zip(captured, again, strict=True):
                assert torch.equal(got, expected)
