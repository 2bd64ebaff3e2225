"""The model `ffnskip` of lm-eval: a Hugging Face model with a skip profile on.

`python -m ffnskip_cli.lm_eval` is `lm_eval` with this model among its own; a version that reads the entry points
`lm_eval.models` has it without that.
"""

from __future__ import annotations

import sys
from typing import Any, Literal

try:
    import lm_eval.models  # noqa: F401  # or lm-eval registers none of its own models
    from lm_eval.models.huggingface import HFLM
except ModuleNotFoundError as missing:
    sentence = f"Evaluation needs {missing.name}: pip install 'ffnskip[eval]'."
    if __name__ == "__main__":
        sys.exit(sentence)
    raise ModuleNotFoundError(sentence, name=missing.name) from None

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ffnskip.errors import FfnskipError
from ffnskip.general.apply import apply
from ffnskip.general.walk import Mode


class FFNSkipLM(HFLM):
    """A Hugging Face model of lm-eval's with a profile on.

    Text that the model writes is decoded: the prompt and the warm-up run dense. What it is only to judge
    (log-likelihoods) goes through it in one pass, in which every position behind the warm-up may skip as if it had been
    generated.

    Args:
        pretrained: as in `HFLM`.
        profile: path of the profile.
        mode: of passes that judge: `score`, see above, or `decode`, in which they run dense, as prompts do.
        threshold, target, other_weights: as in `ffnskip.apply`.
        options: of `HFLM`.

    Raises:
        FfnskipError: there is no profile, or it does not fit; see `ffnskip.apply`.
    """

    def __init__(
        self,
        pretrained: str | PreTrainedModel,
        profile: str | None = None,
        mode: Literal["score", "decode"] = "score",
        threshold: float | None = None,
        target: float | None = None,
        other_weights: bool = False,
        **options: Any,
    ) -> None:
        if profile is None:
            raise FfnskipError("The model ffnskip needs profile=FILE; lm-eval's own model hf is the dense one.")
        super().__init__(pretrained, **options)
        model = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model  # behind adapters
        self._judging: Mode = mode
        self.applied = apply(model, profile, threshold=threshold, target=target, other_weights=other_weights)

    def _model_call(self, inps: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.applied.mode = self._judging
        logits: Tensor = super()._model_call(inps, *args, **kwargs)
        return logits

    def _model_generate(self, *args: Any, **kwargs: Any) -> Tensor:
        self.applied.mode = "decode"
        with torch.no_grad():
            tokens: Tensor = super()._model_generate(*args, **kwargs)
        return tokens

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes into its results about the model."""
        return {**super().get_model_info(), "ffnskip": self.skipped()}

    def skipped(self) -> dict[str, float | int]:
        """The ratio so far, over how many tokens; padding at the end of a batch's shorter texts counts as tokens."""
        stats = self.applied.stats
        return {
            "skip_ratio": stats.skip_ratio,
            "never_skip_fraction": stats.never_skip_fraction,
            "tokens_past_warm_up": stats.tokens,
        }


def main() -> None:
    """What `lm_eval` does, with the model `ffnskip`."""
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.registry import register_model

    register_model("ffnskip")(FFNSkipLM)
    cli_evaluate()


if __name__ == "__main__":
    main()
