"""One thread, few examples; without a GPU kernels are imported for Triton's interpreter."""

import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
torch.set_num_threads(1)  # two on a busy machine wait for each other
settings.register_profile("quick", max_examples=25, deadline=None)
settings.load_profile("quick")
if "TRITON_INTERPRET" not in os.environ and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton and the kernels are imported
    import attention_kernels

    # else PyTorch's path; test_attention_kernels.py sets it
    attention_kernels.INTERPRETED = False
    del os.environ["TRITON_INTERPRET"]


@pytest.fixture
def own_folder(tmp_path, monkeypatch):
    """What a test names lies there."""
    monkeypatch.chdir(tmp_path)
