"""What `key_covariance_` and its companions say of tensors that do not fit together."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from coachhook_kernels.errors import KernelInputError
from coachhook_kernels.key_covariance import key_covariance_, mirror_, require_symmetric

pytest.importorskip("coachhook_kernels.key_covariance.kernel", exc_type=ImportError)

from tests.kernels.test_key_covariance import DEVICE, accumulator, random


class TestBadInput:
    @pytest.mark.parametrize(
        ("moment", "keys", "mask", "message"),
        [
            (torch.zeros(3, 4), torch.zeros(2, 4), None, r"moment must be \(d, d\)"),
            (torch.zeros(9), torch.zeros(2, 9), None, r"moment must be \(d, d\)"),
            (torch.zeros(4, 4).bfloat16(), torch.zeros(2, 4), None, "float32 or float64"),
            (torch.zeros(4, 8)[:, ::2], torch.zeros(2, 4), None, "contiguous"),
            (torch.zeros(4, 4), torch.zeros(4), None, r"keys must be \(n, 4\)"),
            (torch.zeros(4, 4), torch.zeros(2, 5), None, r"keys must be \(n, 4\)"),
            (torch.zeros(4, 4), torch.zeros(2, 4).int(), None, "float dtype"),
            (torch.zeros(4, 4), torch.zeros(2, 4, device="meta"), None, "keys are on meta"),
            (torch.zeros(4, 4), torch.zeros(2, 4), torch.ones(2), "mask must be bool"),
            (torch.zeros(4, 4), torch.zeros(2, 4), torch.ones(3).bool(), r"bool \(2,\)"),
            (torch.zeros(4, 4), torch.zeros(2, 4), torch.ones(2, 1).bool(), r"bool \(2,\)"),
            (
                torch.zeros(4, 4),
                torch.zeros(2, 4),
                torch.ones(2, device="meta").bool(),
                "mask is on meta",
            ),
        ],
    )
    def test_does_not_fit(
        self, moment: Tensor, keys: Tensor, mask: Tensor | None, message: str
    ) -> None:
        with pytest.raises(KernelInputError, match=message):
            key_covariance_(moment, keys, mask)

    @pytest.mark.parametrize("rows", [slice(0, 3), slice(None)])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_keys_that_are_rows_of_the_moment(self, dtype: torch.dtype, rows: slice) -> None:
        moment = accumulator(5).to(dtype)
        before = moment.clone()
        with pytest.raises(KernelInputError, match="share memory; pass a copy"):
            key_covariance_(moment, moment[rows])
        assert torch.equal(moment, before)
        key_covariance_(moment, before[rows])
        parts = torch.zeros(8, 5, device=DEVICE)
        key_covariance_(parts[:5], parts[5:])

    @pytest.mark.parametrize("check", [mirror_, require_symmetric])
    @pytest.mark.parametrize(
        ("moment", "message"),
        [
            (torch.zeros(3, 4), r"moment must be \(d, d\)"),
            (torch.zeros(()), r"moment must be \(d, d\)"),
            (torch.zeros(4, 4).half(), "float32 or float64"),
            (torch.zeros(4, 4).int(), "float32 or float64"),
            (torch.zeros(4).expand(4, 4), "contiguous"),
            (torch.zeros(4, 8)[:, ::2], "contiguous"),
        ],
    )
    def test_a_moment_alone(
        self, moment: Tensor, message: str, check: Callable[[Tensor], object]
    ) -> None:
        with pytest.raises(KernelInputError, match=message):
            check(moment)

    def test_a_moment_that_is_not_symmetric(self) -> None:
        moment = torch.eye(4).index_put((torch.tensor(0), torch.tensor(3)), torch.tensor(0.5))
        before = moment.clone()
        with pytest.raises(KernelInputError, match=r"differ .* by up to 0\.5"):
            key_covariance_(moment, torch.ones(2, 4))
        with pytest.raises(KernelInputError, match="not symmetric"):
            require_symmetric(moment)
        assert torch.equal(moment, before)

    def test_rounding_is_not_asymmetry(self) -> None:
        moment = accumulator(40) + 50 * torch.eye(40, device=DEVICE)
        moment[3, 7] *= 1 + 1e-6
        require_symmetric(moment)
        key_covariance_(moment, random(3, 40))
        assert torch.equal(moment, moment.mT)

    def test_what_is_not_finite_is_no_asymmetry(self) -> None:
        require_symmetric(torch.full((3, 3), torch.nan))
        require_symmetric(torch.full((3, 3), torch.inf))
