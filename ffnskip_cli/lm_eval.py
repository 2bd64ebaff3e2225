"""lm-eval with a profile on: the model `ffnskip`.

Releases of lm-eval that look for entry points find it there; `python -m ffnskip_cli.lm_eval` is the command line of any
other release, with this model added. A program registers it by importing this module.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import Any, get_args

import torch
from torch import Tensor

from ffnskip.errors import FfnskipError
from ffnskip.general.apply import apply
from ffnskip.general.walk import Mode
from ffnskip.profiles.profile import Profile, load_profile
from ffnskip.stats import SkipStats
from ffnskip_cli import console

MISSING = "lm-eval is not installed: pip install 'ffnskip[eval]'."
try:
    import lm_eval.models  # noqa: F401 - fills the registry, which it does not once another model is in there
    from lm_eval.api.registry import model_registry
    from lm_eval.models.huggingface import HFLM
except ModuleNotFoundError as error:
    if __name__ != "__main__":
        raise FfnskipError(MISSING) from error
    console.error(MISSING)
    sys.exit(2)

_log = logging.getLogger("lm_eval.models.ffnskip")


class FfnskipLM(HFLM):
    """lm-eval's model of Hugging Face decoders, `hf`, with a profile on.

    What is scored runs in score mode: each request's context and continuation are one pass, and every position from
    `warm_up` on may skip. What is generated runs in decode mode: the prompt and the first `warm_up` new tokens are
    dense. Requests of a batch skip as they would alone.

    Args:
        pretrained: as for `hf`: a Hub id, a folder, or a model.
        profile: a profile, or the path of one.
        mode: `score` or `decode`, of all requests; None is as said above.
        threshold, target, other_weights: as in `ffnskip.apply`.
        options: all others of `hf`.

    Attributes:
        applied: the profile at work.

    Raises:
        FfnskipError: there is no profile, the mode is unknown, or what `ffnskip.apply` raises.
    """

    def __init__(
        self,
        pretrained: Any,
        profile: Profile | str | os.PathLike[str] | None = None,
        *,
        mode: Mode | None = None,
        threshold: float | None = None,
        target: float | None = None,
        other_weights: bool = False,
        **options: Any,
    ) -> None:
        if profile is None:
            raise FfnskipError("The model ffnskip needs profile=FILE; lm-eval's model hf is the dense one.")
        if mode not in (*get_args(Mode), None):
            raise FfnskipError(f"The mode must be one of {', '.join(get_args(Mode))}, not {mode!r}.")
        if not isinstance(profile, Profile):
            profile = load_profile(profile)
        profile = profile.moved(threshold=threshold, target=target)  # before weights are loaded, which takes long
        super().__init__(pretrained, **options)
        # Not in `_create_model`, which a model that is loaded already does not pass through, and after which the
        # weights may yet move to a device.
        self.applied = apply(self.model, profile, mode=mode or "decode", other_weights=other_weights)
        self._mode = mode
        self._inputs: set[int] = set()
        self._stats: SkipStats | None = None

    @property
    def stats(self) -> SkipStats:
        """What was skipped so far; on the first of several processes, when all are done, by all of them."""
        return self._stats or self.applied.stats

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval adds to its results when it is done; says what was skipped."""
        profile, stats = self.applied.profile, self.stats
        figures = {
            "profile": profile.model_dump(mode="json"),
            "skip_ratio": stats.skip_ratio,
            "never_skip_fraction": stats.never_skip_fraction,
            "tokens_past_warm_up": stats.tokens,
            "warm_up_tokens": stats.warm_up_tokens,
        }
        _log.info(sentence(stats))
        return {**super().get_model_info(), "ffnskip": figures}

    def gather_object(self, obj: object, dst: int = 0) -> list[object] | None:
        """Collect an object of every process; what each has counted comes along."""
        gathered = super().gather_object((obj, self.applied.stats), dst)
        if gathered is None:
            return None
        self._stats = SkipStats(self.applied.stats.n_layers)
        for _, stats in gathered:
            self._stats.add(stats)
        return [each for each, _ in gathered]

    def _loglikelihood_tokens(self, requests: list[Any], *args: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        longest = self.max_length + 1
        self._inputs = {_fingerprint((context + continuation)[-longest:][:-1]) for _, context, continuation in requests}
        answers: list[tuple[float, bool]] = super()._loglikelihood_tokens(requests, *args, **kwargs)
        return answers

    def _model_call(self, inps: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.applied.mode = self._mode or "score"
        self.applied.real = self._real(inps)
        try:
            logits: Tensor = super()._model_call(inps, *args, **kwargs)
        finally:
            self.applied.real = None
        return logits

    def _model_generate(self, *args: Any, **kwargs: Any) -> Tensor:
        self.applied.mode = self._mode or "decode"
        tokens: Tensor = super()._model_generate(*args, **kwargs)
        return tokens

    def _detect_batch_size(self, *args: Any, **kwargs: Any) -> int:
        """lm-eval tries sizes on text that nobody asked for."""
        self.applied.asleep = True
        try:
            size: int = super()._detect_batch_size(*args, **kwargs)
        finally:
            self.applied.asleep = False
        return size

    def _real(self, inputs: Tensor) -> Tensor:
        """Which tokens are no padding, ``[batch, sequence]``.

        lm-eval pads on the right with zeros, which may be tokens, and gives the model no mask: there, what stands
        behind a text does not change its logits. A row's text is the longest start of it that was asked for.
        """
        real: Tensor = torch.ones_like(inputs, dtype=torch.bool)
        for row, tokens in zip(real, inputs.tolist(), strict=True):
            lengths = range(len(tokens), 0, -1)
            length = next((n for n in lengths if _fingerprint(tokens[:n]) in self._inputs), len(tokens))
            row[length:] = False
        return real


def sentence(stats: SkipStats) -> str:
    """What was skipped, in words."""
    return (
        f"skip_ratio {stats.skip_ratio:.3f}, never_skip_fraction {stats.never_skip_fraction:.3f} over {stats.tokens} "
        f"tokens past warm-up; {stats.warm_up_tokens} were within it"
    )


def main() -> None:
    """lm-eval's command line; a mistake in what it is told of the profile is one sentence."""
    from lm_eval.__main__ import cli_evaluate

    try:
        with console.own_warnings():
            cli_evaluate()
    except FfnskipError as mistake:
        console.error(str(mistake))
        sys.exit(2)


def _fingerprint(tokens: list[int]) -> int:
    return hash(tuple(tokens))


if "ffnskip" not in model_registry:
    model_registry.register("ffnskip", target="ffnskip_cli.lm_eval:FfnskipLM")

if __name__ == "__main__":
    main()
