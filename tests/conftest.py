"""What holds for all tests."""

import os

import torch

# Triton reads it when a kernel is defined: without a GPU, kernels are tested for their meaning.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
