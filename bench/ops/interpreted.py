"""The kernels on a machine without a GPU: Triton's interpreter on tiny shapes, which checks what a
script does and what the kernels mean. Times mean nothing."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch

from bench.ops import memory
from bench.ops.cases import Case
from coachhook_kernels.launch import runtime

# A key has to be this long for it to hold a fingerprint among others.
LONG = 512
TINY = (
    Case("keyed, closed", "hook_linear", 128, 32, 2, edits=40, must=9999),
    Case("keyed, 1 % open", "hook_linear", LONG, 32, 70, n_open=1, edits=40, must=9999),
    Case("calibrated, rank 8", "hook_linear", 128, 32, 2, "calibrated", 8, must=9999),
    Case("sequence, dense", "hook_linear_sequence", 64, 32, 34, "sequence", must=2.1, faster=2.0),
    Case("second moment", "key_covariance_", 64, 64, 128, must=9999),
    Case("entries", memory.GATE, 128, 64, 18, edits=14, must=9999),
    Case("entries, float32", memory.GATE, 40, 64, 2, edits=3, must=9999, dtype=torch.float32),
    Case("one in 16 open", memory.ADD, LONG, LONG, 33, n_open=2, edits=14, must=9999),
    Case("layer, closed", memory.LAYER, 128, 32, 2, edits=14, must=9999),
)


@contextmanager
def interpreted() -> Iterator[None]:
    """Inside the block the operations run their kernels where there is no GPU, if TRITON_INTERPRET
    was set when these were imported; with a GPU nothing changes."""
    if torch.cuda.is_available():
        yield
        return
    with mock.patch.object(runtime, "_runs_on", return_value=runtime.interpreting()):
        yield
