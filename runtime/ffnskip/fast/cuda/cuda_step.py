"""The fused step on a GPU: Triton kernels, recorded once as a CUDA graph and replayed for every token.

Experimental: no GPU has run it yet, only Triton's interpreter has.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from ffnskip.errors import FfnskipError, UnsupportedModelError
from ffnskip.fast.cache import KeyValueCache
from ffnskip.fast.fused_model import FusedModel
from ffnskip.fast.layout import input_stretch
from ffnskip.fast.skipping import FusedSkip
from ffnskip.fast.step import MAX_BATCH
from ffnskip.stats import SkipStats

_WARM_UPS = 2  # passes before recording: the first compiles the kernels, which a graph cannot record


class CudaStep:
    """A fused step on a GPU, see `ffnskip.fast.step.FusedStep`.

    On a CPU it takes the same way through Triton's interpreter, without a graph: slow, and right for tests.

    Args:
        model: the model.
        cache: of at most 16 sequences.
        skip: the profile; None runs dense.

    Raises:
        UnsupportedModelError: there is no Triton, or no device that it runs on.
        FfnskipError: the batch is too large.
    """

    def __init__(self, model: FusedModel, cache: KeyValueCache, skip: FusedSkip | None) -> None:
        try:
            from ffnskip.fast.cuda.cuda_parts import PartsPass
            from ffnskip.fast.cuda.cuda_pass import INTERPRETED, CudaPass
        except ImportError as error:
            raise UnsupportedModelError("The decode step on a GPU needs Triton: pip install triton.") from error
        if model.device.type != "cuda" and not INTERPRETED:
            raise UnsupportedModelError("The decode step of Triton kernels needs a CUDA device.")
        if model.residual_scale != 1 or model.logit_scale != 1 or model.layers[0].norm_attention is None:
            raise UnsupportedModelError("The kernels for GPUs know no scaled residuals and no layers without norms.")
        if cache.batch > MAX_BATCH:
            raise FfnskipError(f"The decode step on a GPU takes at most {MAX_BATCH} sequences at once.")
        self.cache = cache
        self._records = model.device.type == "cuda" and not INTERPRETED
        self._graph: torch.cuda.CUDAGraph | None = None
        self._expected = 0  # the cache's length after the latest step, which the position on the device equals
        self._on_device = torch.cuda.device(model.device) if model.device.type == "cuda" else nullcontext()
        with self._on_device, torch.inference_mode(False):  # or the buffers could not be written outside of it
            by_input = input_stretch(model.layers[0].gate.data) > 0
            self._pass = (PartsPass if by_input else CudaPass)(model, cache, skip)

    @torch.no_grad()
    def __call__(self, tokens: Tensor, ended: Tensor, counted: Tensor, allowed: Tensor) -> Tensor:
        """See `FusedStep`."""
        if self.cache.length >= self.cache.capacity:
            raise FfnskipError(f"The key-value cache is full: it holds {self.cache.capacity} tokens.")
        # Copies this small do not wait for the device, wherever they come from.
        self._pass.tokens.copy_(tokens, non_blocking=True)
        self._pass.ended.copy_(ended, non_blocking=True)
        self._pass.counted.copy_(counted, non_blocking=True)
        self._pass.allowed.copy_(allowed, non_blocking=True)
        if self.cache.length != self._expected:  # the cache has been filled with a prompt
            self._pass.position.fill_(self.cache.length)
        with self._on_device:
            if self._records and self._graph is None:
                self._record()
            if self._graph is None:
                self._pass.launch()
            else:
                self._graph.replay()
        self.cache.length += 1
        self._expected = self.cache.length
        return self._pass.logits

    def drain_counts(self, stats: SkipStats) -> None:
        """See `FusedStep`."""
        self._pass.drain(stats)

    def read(self, prompts: Tensor, starts: Tensor) -> Tensor:
        """See `FusedStep`."""
        raise UnsupportedModelError("On a GPU the model's own forward pass reads prompts.")

    def seconds(self) -> None:
        """See `FusedStep`; a graph does not tell its parts apart."""

    def _record(self) -> None:
        """Record one pass. What the warm-up wrote into the cache is what the first replay will write there again."""
        state = self._pass.state
        before = [tensor.clone() for tensor in state]
        side = torch.cuda.Stream(self._pass.tokens.device)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UPS):
                self._pass.launch()
                for tensor, value in zip(state, before, strict=True):
                    tensor.copy_(value)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._pass.launch()
        self._graph = graph
