"""Elements further apart than 32 bits can say: in tensors without memory, and in files that are
mostly holes, with a stride from row to row so long that every tile reaches past 2³¹."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from coachhook_kernels import (
    Delta,
    TokenGate,
    fingerprint_similarity,
    hook_correction_,
    hook_linear,
    hook_linear_sequence,
    key_covariance_,
)
from coachhook_kernels.hook_linear import reference
from coachhook_kernels.hook_linear_sequence import op as sequence_op
from coachhook_kernels.hook_linear_sequence import reference as sequence_reference
from tests.support.kernels import BRAIN, DEVICE, FORMS, SINGLE, forms, make, run_linear

pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning")]

META = torch.device("meta")


def meta(*shape: int, dtype: torch.dtype = SINGLE) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


class TestWithoutMemory:
    """Keys and outputs of more than 2³¹ elements, as meta tensors: shapes and dtypes."""

    ROWS, WIDTH = 2**20, 4096

    def gate(self, keyed: bool) -> TokenGate:
        gate = TokenGate(meta(), meta(), meta())
        if not keyed:
            return gate
        return TokenGate(
            *gate[:3], meta(64, self.WIDTH), meta(64), meta(9, 64), meta(9, dtype=torch.bool)
        )

    @pytest.mark.parametrize("keyed", [True, False])
    def test_layers(self, keyed: bool) -> None:
        keys, weight = meta(2, self.ROWS // 2, self.WIDTH), meta(self.WIDTH, self.WIDTH)
        gate, delta = self.gate(keyed), Delta(weight)
        output, score, index = hook_linear(keys, weight, None, delta, gate)
        assert output.shape == keys.shape
        assert output.numel() > 2**31
        assert (score.shape, index.dtype) == (keys.shape[:2], torch.int64)
        score, index = hook_correction_(output, keys, delta, gate)
        assert score.shape == index.shape == keys.shape[:2]
        output, score, z = hook_linear_sequence(keys, weight, None, delta, None, meta())
        assert output.shape == keys.shape
        assert score.shape == z.shape == keys.shape[:2]

    def test_the_others(self) -> None:
        moment = meta(2**16, 2**16)
        assert key_covariance_(moment, meta(2**16, 2**16), meta(2**16, dtype=torch.bool)) is moment
        best, _ = fingerprint_similarity(meta(self.ROWS, self.WIDTH), *self.gate(True)[3:])
        assert best.shape == (self.ROWS,)


def far_rows(rows: Tensor, path: Path) -> Tensor:
    """The same rows, each so far behind the last that those of a tile of 16 pass 2³¹ elements."""
    n_rows, width = rows.shape
    stride = 2**31 // min(n_rows - 1, 15) + 64
    size = n_rows * stride
    found = torch.from_file(str(path), shared=True, size=size, dtype=rows.dtype)
    far = found.as_strided((n_rows, width), (stride, 1))
    far.copy_(rows)
    return far


@pytest.fixture
def _kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr("coachhook_kernels.launch.runtime.triton_runs", lambda *_: True)
    monkeypatch.setattr(sequence_op, "triton_runs", lambda *_: True)


@pytest.mark.skipif(DEVICE != "cpu", reason="a file is mapped into the host's memory")
@pytest.mark.usefixtures("_kernels")
class TestFarApart:
    @forms
    @pytest.mark.parametrize(("n_rows", "dtype"), [(16, BRAIN), (20, SINGLE)], ids=str)
    def test_keys_of_a_layer(
        self, dtype: torch.dtype, n_rows: int, form: str, tmp_path: Path
    ) -> None:
        problem = make(replace(FORMS[form], rows=n_rows, dtype=dtype))
        near = run_linear(problem)
        far = problem._replace(keys=far_rows(problem.keys, tmp_path / "keys"))
        for got, want in zip(run_linear(far), near, strict=True):
            torch.testing.assert_close(got, want)

    @forms
    def test_outputs(self, form: str, tmp_path: Path) -> None:
        problem = make(replace(FORMS[form], rows=20))
        base = linear(problem.keys, problem.weight, problem.bias)
        output = far_rows(base, tmp_path / "output")
        score, index = hook_correction_(output, *problem[:1], *problem[3:])
        expected = reference.hook_linear(*problem)
        torch.testing.assert_close((output, score, index), expected, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("part", ["weight", "down", "up", "by column"])
    @pytest.mark.parametrize(("n_rows", "dtype"), [(16, BRAIN), (20, SINGLE)], ids=str)
    def test_matrices_of_a_sequence(
        self, n_rows: int, part: str, dtype: torch.dtype, tmp_path: Path
    ) -> None:
        factored = part == "up"
        form = FORMS["calibrated factored" if factored else "calibrated dense"]
        problem = make(replace(form, rows=n_rows, dtype=dtype))
        down, up = problem.delta
        weight = problem.weight
        if part == "weight":
            weight = far_rows(weight, tmp_path / "weight")
        elif part == "down":
            down = far_rows(down, tmp_path / "down")
        elif part == "up":
            assert up is not None
            up = far_rows(up.mT, tmp_path / "up").mT
        else:
            weight = far_rows(weight.mT, tmp_path / "weight").mT
        given = (problem.keys[None], weight, problem.bias, Delta(down, up), None)
        got = hook_linear_sequence(*given, torch.tensor(0.5))
        expected = sequence_reference.hook_linear_sequence(*given, torch.tensor(0.5))
        rounding = 1e-4 if dtype == SINGLE else 3e-2
        torch.testing.assert_close(got, expected, rtol=rounding, atol=rounding)

    def test_keys_of_a_moment(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from coachhook_kernels.key_covariance import configs, kernel

        keys = make(FORMS["keyed dense"]).keys[:, :32].contiguous()
        got, want = torch.zeros(32, 32), torch.zeros(32, 32)
        config = configs.POINTER | {"block_i": 32, "block_j": 64, "block_n": 32}
        kernel.add_triangle(got, far_rows(keys, tmp_path / "keys"), None, True, config)
        kernel.add_triangle(want, keys, None, True, config)
        assert torch.equal(got, want)
