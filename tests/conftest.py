"""Without a GPU the kernels are imported for Triton's interpreter; only their own tests run so."""

import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
if "TRITON_INTERPRET" not in os.environ and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton and the kernels are imported
    import attention_kernels

    # the entry takes the PyTorch path; test_attention_kernels.py sets this for itself
    attention_kernels.INTERPRETED = False
    del os.environ["TRITON_INTERPRET"]
