"""What holds for all tests."""

import os

import torch
from hypothesis import settings

# How long an example takes says nothing on a machine that others work on. CI tries the same
# examples every time; elsewhere each run tries others.
settings.register_profile(
    "suite", deadline=None, derandomize=bool(os.environ.get("CI")), print_blob=True
)
settings.load_profile("suite")

# Triton reads it when a kernel is defined: without a GPU, kernels are tested for their meaning.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
