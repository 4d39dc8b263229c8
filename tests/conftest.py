"""Where there is no GPU the attention kernels are imported for Triton's interpreter. Only their own tests run them so: it is slow."""

import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
if "TRITON_INTERPRET" not in os.environ and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton and the kernels are imported
    import attention_kernels

    attention_kernels.INTERPRETED = (
        False  # the entry takes the PyTorch path; test_attention_kernels.py sets this for itself
    )
    del os.environ["TRITON_INTERPRET"]
