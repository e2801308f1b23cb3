"""Without a GPU the Triton kernels run in Triton's interpreter."""

import os

import torch

# Triton reads it when a kernel is defined, so it must be set before any kernel module is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
