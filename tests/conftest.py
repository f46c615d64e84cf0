"""What several test files share."""

import importlib
import os
from typing import Any

import pytest
import torch

# Triton reads it when a kernel is defined: without a GPU, kernels are tested for their meaning.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture
def bench() -> Any:
    """Imports a module of bench/ by its name."""
    return importlib.import_module
