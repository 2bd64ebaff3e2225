"""The kernels also compile for a GPU, of which the tests in Triton's interpreter say nothing. That needs no GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
PROGRAM = """
import torch
import triton
from support.factories import make_compensated
from support.pico import pico_model
from support.price import price_profile
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from ffnskip.fast.cache import KeyValueCache
from ffnskip.fast.cuda.cuda_parts import PartsPass
from ffnskip.fast.cuda.cuda_pass import CudaPass
from ffnskip.fast.families import fuse
from ffnskip.fast.skipping import fuse_profile


class NoDevice:
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 80, 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)


def compile_only(kernel, *args, grid, warmup=False, **options):
    names.add(kernel.fn.__name__)
    return run(kernel, *args, grid=grid, warmup=True, **options)


names = set()
driver.set_active(NoDevice())
run, JITFunction.run = JITFunction.run, compile_only
model = fuse(pico_model("gemma2", torch.bfloat16))
profile = make_compensated("low-rank", rule="predicted-damage", rank=4, neurons=6, cold_s=0, cold_e=6)
skip = fuse_profile(profile, model.intermediate, model.device)
for batch, skip in ((1, skip), (2, None)):
    CudaPass(model, KeyValueCache.allocate(model, batch, 8, torch.bfloat16), skip).launch()
model = pico_model("gemma2", torch.bfloat16)
profile = price_profile(model)
model = fuse(model, by_input=True)
for batch in (1, 2):
    skip = fuse_profile(profile, model.intermediate, model.device)
    PartsPass(model, KeyValueCache.allocate(model, batch, 8, torch.bfloat16), skip).launch()
print(*sorted(names))
"""
KERNELS = """
_activate_kernel _add_up_kernel _attend_kernel _collect_kernel _contract_kernel _count_kernel _enter_kernel
_leave_kernel _merge_kernel _project_kernel _rotate_kernel _thin_kernel
"""


def test_all_kernels_compile_without_a_gpu(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    path = os.pathsep.join([str(TESTS), str(TESTS.parent), *sys.path])
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": path}
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM], capture_output=True, text=True, env=environment
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == KERNELS.split()
