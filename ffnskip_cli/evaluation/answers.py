"""Every answer of a model in a file, as it comes: an eval that was killed goes on from there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval.models.huggingface import HFLM

from ffnskip.stats import SkipStats
from ffnskip_cli.lm_eval import FfnskipLM
from ffnskip_cli.progress import Journal

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

    from ffnskip.general.wrap import Applied


class Answers:
    """The answers of one model with one profile, or without one; lm-eval hands them over as its cache hook.

    Each line of the file is a list: a hash of what was asked of whom, what was asked and answered, and a hash of the
    line. A line that a kill cut short is not read. Sampled answers are written and never taken: each draw differs.

    Args:
        folder: where the file is kept, among those of other evals, which have other names.
        who: `dense` or `profile`, the start of the file's name.
        subject: all that an answer depends on besides what is asked: weights, profile, dtype. Plain data.

    Attributes:
        path: the file.
        taken: how many answers were taken from it rather than asked for.
    """

    def __init__(self, folder: Path, who: str, subject: Mapping[str, object]) -> None:
        digest = hashlib.sha256(json.dumps(subject, sort_keys=True).encode()).hexdigest()
        self.path = folder / f"{who}-{digest[:16]}.jsonl"
        self.taken = 0
        self._journal = Journal(self.path, subject, resume=True)
        self._journal.remember("subject", lambda: dict(subject))
        self._applied: Applied | None = None
        self._skipped: SkipStats | None = None

    def count(self, applied: Applied) -> None:
        """Keep with the answers what this profile skips for them."""
        n_layers = applied.stats.n_layers
        self._applied, self._skipped, self._of_taken = applied, SkipStats(n_layers), SkipStats(n_layers)

    def add_partial(self, kind: str, asked: Iterable[Any], answer: Any) -> None:
        """Write down an answer. Of a batch's answers the first carries what all of them have skipped."""
        entry = {"kind": kind, "asked": list(asked), "answer": answer, "skipped": self._skipped_since()}
        self._journal.keep([kind, entry["asked"]], entry)

    def complete(
        self, kind: str, requests: Sequence[Instance], ask: Callable[[list[Instance]], Sequence[Any]]
    ) -> list[Any]:
        """The answers to all requests, asking only for those that are not kept."""
        known = [self._known(kind, request.args) for request in requests]
        left = [request for request, entry in zip(requests, known, strict=True) if entry is None]
        self.taken += len(requests) - len(left)
        fresh = iter(ask(left) if left else ())
        return [next(fresh) if entry is None else _answer(entry) for entry in known]

    def settle(self) -> None:
        """Add to the profile's counts those of the answers, taken and asked for."""
        if self._applied is not None and self._skipped is not None:
            self._skipped_since()
            self._applied.stats.add(self._skipped)
            walk, taken = self._applied.walk, self._of_taken
            walk.allowed_tokens += taken.tokens  # or it would warn that nothing was allowed to skip
            walk.generated_tokens += taken.tokens + taken.warm_up_tokens

    def _known(self, kind: str, asked: Sequence[Any]) -> Any:
        if kind == "generate_until" and asked[1].get("do_sample"):
            return None
        entry = self._journal.kept([kind, list(asked)])
        if entry is not None and entry["skipped"] is not None and self._skipped is not None:
            for counts in (self._skipped, self._of_taken):
                counts.add(SkipStats(**entry["skipped"]))
        return entry

    def _skipped_since(self) -> dict[str, Any] | None:
        """What was skipped since this was last asked; moves it from the profile's counts into those of the answers."""
        if self._applied is None or self._skipped is None:
            return None
        stats = self._applied.stats
        if not (stats.tokens or stats.warm_up_tokens):
            return None
        counts = asdict(stats)
        self._skipped.add(stats)
        stats.clear()
        return counts


def _answer(entry: dict[str, Any]) -> Any:
    answer = entry["answer"]
    return tuple(answer) if isinstance(answer, list) else answer  # a log-likelihood, and whether it is greedy


class Remembering(HFLM):
    """A model of lm-eval that keeps its answers, and is not asked again for those that it has given."""

    answers: Answers

    def keep(self, answers: Answers) -> None:
        """Keep the answers here, from now on."""
        self.answers = answers
        self.set_cache_hook(answers)

    def generate_until(self, requests: list[Instance], *args: Any, **kwargs: Any) -> list[str]:
        """As that of `hf`."""
        ask = super().generate_until
        return self.answers.complete("generate_until", requests, lambda left: ask(left, *args, **kwargs))

    def loglikelihood(self, requests: list[Instance], *args: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        """As that of `hf`."""
        ask = super().loglikelihood
        return self.answers.complete("loglikelihood", requests, lambda left: ask(left, *args, **kwargs))

    def loglikelihood_rolling(self, requests: list[Instance], *args: Any, **kwargs: Any) -> list[float]:
        """As that of `hf`."""
        ask = super().loglikelihood_rolling
        return self.answers.complete("loglikelihood_rolling", requests, lambda left: ask(left, *args, **kwargs))


class DenseLM(Remembering):
    """The dense model."""


class SkippingLM(Remembering, FfnskipLM):
    """The model with the profile."""

    def keep(self, answers: Answers) -> None:
        """Keep the answers here, and with each what was skipped for it."""
        super().keep(answers)
        answers.count(self.applied)
