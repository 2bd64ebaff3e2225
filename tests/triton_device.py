"""Where tests run Triton kernels: on the GPU, or else on the CPU in Triton's interpreter. Import this before them.

Triton decides when it is imported whether it interprets, and transformers may have imported it already.
"""

import os
import sys

import pytest
import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

if DEVICE.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
    os.environ["TRITON_INTERPRET"] = "1"
    for name in list(sys.modules):
        if name.split(".")[0] == "triton" and not name.startswith("triton._C"):
            del sys.modules[name]

pytest.importorskip("triton")
