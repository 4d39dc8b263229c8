"""One thread; without a GPU the kernels are imported for Triton's interpreter, for their tests."""

import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
torch.set_num_threads(1)  # two on a busy machine wait for each other
if "TRITON_INTERPRET" not in os.environ and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton and the kernels are imported
    import attention_kernels

    # the entry takes the PyTorch path; test_attention_kernels.py sets this for itself
    attention_kernels.INTERPRETED = False
    del os.environ["TRITON_INTERPRET"]
