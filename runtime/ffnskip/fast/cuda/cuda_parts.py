"""The step's launches over matrices that lie input by input, where the rule `price` leaves out inputs.

Experimental: see `cuda_step`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ffnskip.fast.cache import KeyValueCache
from ffnskip.fast.cuda import kernels_parts, kernels_stream
from ffnskip.fast.cuda.cuda_pass import CudaPass
from ffnskip.fast.fused_model import Activation, FusedLayer, FusedModel
from ffnskip.fast.parts import PartCounts
from ffnskip.fast.skipping import FusedSkip
from ffnskip.model.matrix import Matrix
from ffnskip.model.parts import ROLES
from ffnskip.stats import SkipStats


class PartsPass(CudaPass):
    """See `CudaPass`; the profile is one of the rule `price`, or None."""

    def __init__(self, model: FusedModel, cache: KeyValueCache, skip: FusedSkip | None) -> None:
        super().__init__(model, cache, skip)
        self._parts = PartCounts(model)
        self._shares = torch.tensor(self._parts.shares, dtype=torch.float64, device=model.device)
        shape = len(model.layers), len(ROLES), cache.batch
        self._left_out = torch.zeros(shape, dtype=torch.int64, device=model.device)  # of this token
        self.state += [self._parts.left_out, self._parts.least]

    def drain(self, stats: SkipStats) -> None:
        """See `CudaPass`."""
        super().drain(stats)
        self._parts.drain(stats)

    def _project(
        self, index: int, role: str, matrix: Matrix, x: Tensor, y: Tensor, activation: Activation | None = None
    ) -> None:
        """See `CudaPass`; in an FFN, too. Inputs that are left out become zero in `x`."""
        skip, place = self._skip, ROLES.index(role)
        if skip is not None and skip.cold_s <= index < skip.cold_e:
            limit = skip.limits[index - skip.cold_s][place]
            kernels_parts.thin(x, limit, self.allowed, self.ended, self._left_out[index, place])
        kernels_parts.project(matrix, x, y, activation)

    def _launch_ffn(self, index: int, layer: FusedLayer) -> None:
        """See `CudaPass`."""
        entering, leaving = self._norms(index, layer)
        kernels_stream.enter_ffn(self._h, self._y, self._x, **entering)
        self._project(
            index, "ffn_input", self._gate_up_matrices[index], self._x, self._a, activation=self._model.activation
        )
        self._project(index, "neurons", layer.down, self._a, self._y)
        kernels_stream.leave_ffn(self._h, self._y, self._x, **leaving)

    def _count(self) -> None:
        """Count as `ffnskip.SkipStats` does; the numbers are few, so that PyTorch's own kernels will do."""
        skip, parts = self._skip, self._parts
        if skip is not None:
            self.per_layer[1, skip.cold_s : skip.cold_e] += self.allowed
        self.never += self.counted & (self._left_out == 0).all(dim=1).all(dim=0)
        parts.left_out += self._left_out.sum(dim=2)
        ffns = (self._left_out * self._shares[:, None]).sum(dim=(0, 1)) / len(self._left_out)
        parts.least.clamp_(max=ffns.masked_fill(~self.counted, 1.0).min())
