"""Where tests run Triton kernels: on the GPU, or else on the CPU in Triton's interpreter (`conftest.py` sees to it)."""

import pytest
import torch

pytest.importorskip("triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
