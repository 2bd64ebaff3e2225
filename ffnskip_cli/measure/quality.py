"""What skipping costs: perplexity, KL divergence and top-1 agreement against the dense model on the same text.

Measured in score mode on whole sequences. Only positions past warm-up count, for the dense model too: the others cannot
differ by a skip of their own and would dilute the figures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from ffnskip.errors import FfnskipError
from ffnskip.general.wrap import Applied
from ffnskip.model.forward import forward
from ffnskip.model.sites import input_device
from ffnskip.profiles.profile import Profile
from ffnskip.stats import SkipStats
from ffnskip_cli.progress import Journal, Track

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROWS = 256  # positions whose logits are widened to float32 at a time
_NGRAM = 4  # tokens that repeat each other, in a text that does
_KL = 2  # which of the five figures of a sequence it is
_MAX_NLL = 500.0  # nats per token; beyond it the perplexity, or its error, would be too large for a float


@dataclass(frozen=True)
class Estimate:
    """A mean over tokens with its standard error, taken over sequences because tokens of one sequence correlate."""

    mean: float
    standard_error: float


def paired_difference(one: Tensor, other: Tensor) -> Estimate:
    """Mean of ``one - other [sequences]`` with its standard error, which is small where both rise and fall together."""
    difference = one.double() - other.double()
    return Estimate(float(difference.mean()), float(difference.std() / len(difference) ** 0.5))


def repetition(texts: Tensor) -> float:
    """Share of 4-grams that occurred before in the same text (seq-rep-4, Welleck et al. 2020).

    The mean over ``texts [n, length]``; 0 for fewer than four tokens.
    """
    shares = []
    for tokens in texts.tolist():
        ngrams = [tuple(tokens[i : i + _NGRAM]) for i in range(len(tokens) - _NGRAM + 1)]
        shares.append(1.0 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0)
    return sum(shares) / len(shares)


class AtWork(Protocol):
    """What changes the model inside a ``with``, and counts what it skips."""

    @property
    def stats(self) -> SkipStats: ...  # noqa: D102
    def __enter__(self) -> object: ...
    def __exit__(self, *error: Any) -> None: ...


class Way(Protocol):
    """Another way to skip than a profile's own rule; its `repr` says all that decides what it skips."""

    def applied(self, model: PreTrainedModel, profile: Profile, sequence: Tensor) -> AtWork:
        """For one pass over a ``sequence [length]``, leaving the warm-up of the profile dense."""


def at_work(model: PreTrainedModel, profile: Profile, way: Way | None, sequence: Tensor) -> AtWork:
    """What skips in one pass over a ``sequence [length]`` in score mode: the way, or else the profile's own rule."""
    return Applied(model, profile, "score") if way is None else way.applied(model, profile, sequence)


@dataclass(frozen=True)
class Quality:
    """A profile's cost on a text.

    Attributes:
        sequences: how many were scored.
        tokens: predictions that the figures are means over.
        nll_dense, nll: nats per token of the text itself, without and with the profile.
        kl: KL(dense || profile) of the next-token distributions, nats per token.
        top1_agreement: share of positions at which both models would greedily say the same.
        skip_ratio: skipped FFN blocks / (n_layers x tokens past warm-up).
        stats: what was skipped, in counts.
        kl_by_sequence: the means that `kl` is the mean of, to compare profiles pair by pair.
        kl_by_token: ``[tokens]`` each, `kl` and the other direction, KL(profile || dense); None unless asked for.
    """

    sequences: int
    tokens: int
    nll_dense: Estimate
    nll: Estimate
    kl: Estimate
    top1_agreement: Estimate
    skip_ratio: Estimate
    stats: SkipStats
    kl_by_sequence: tuple[float, ...]
    kl_by_token: tuple[Tensor, Tensor] | None = None

    @property
    def perplexity(self) -> Estimate:
        """``exp(nll)``, 1e217 at most, its error by the delta method."""
        return _exp(self.nll)

    @property
    def perplexity_dense(self) -> Estimate:
        """``exp(nll_dense)``, its error by the delta method."""
        return _exp(self.nll_dense)


def measure_quality(
    model: PreTrainedModel,
    profiles: Sequence[Profile],
    tokens: Tensor,
    track: Track,
    *,
    what: str = "measuring quality",
    first: int | None = None,
    journal: Journal | None = None,
    ways: Sequence[Way | None] | None = None,
    reference: PreTrainedModel | None = None,
    by_token: bool = False,
) -> list[Quality]:
    """Score `tokens` with the dense model once and with each profile.

    Args:
        model: the untouched model.
        profiles: for this model; only their rule and their compensation matter.
        tokens: ``[sequences, length]``.
        track: shows progress.
        what: what to call this in the progress.
        first: position of the first prediction that counts; by default each profile's warm-up.
        journal: remembers the figures of each sequence.
        ways: one per profile, to skip in the place of its own rule, or None for that.
        reference: the dense model to compare with, if it is another one than `model`.
        by_token: keep the KL of each token.

    Returns:
        One Quality per profile.

    Raises:
        FfnskipError: there are fewer than two sequences, or they end before the warm-up does, or the model computes
            infinities.
    """
    journal = journal or Journal()
    firsts = [profile.skip.warm_up if first is None else first for profile in profiles]
    for position in firsts:
        check_size(tokens, position)
    tables: list[list[list[float]]] = [[] for _ in profiles]  # per profile and sequence: means of the five figures
    totals = [SkipStats(profile.model.n_layers) for profile in profiles]
    kls: list[list[Tensor]] = [[] for _ in profiles]
    ways = [None] * len(profiles) if ways is None else list(ways)
    settings = [[profile.deciding, repr(way)] for profile, way in zip(profiles, ways, strict=True)]
    for sequence in track(tokens, what, len(tokens)):
        scores = journal.remember(
            ["quality", settings, firsts, sequence.tolist(), *["by token"] * by_token],
            partial(_score, model, reference or model, profiles, ways, sequence.long(), firsts, by_token),
        )
        for (figures, counts, kl), table, total, of_tokens in zip(scores, tables, totals, kls, strict=True):
            stats = SkipStats(**counts)
            of_tokens.append(torch.tensor(kl, dtype=torch.float64))
            table.append([*figures, stats.skip_ratio])
            total.add(stats)
    per_sequence = [tokens.shape[1] - 1 - position for position in firsts]
    found = [_quality(t, s, n * len(tokens)) for t, s, n in zip(tables, totals, per_sequence, strict=True)]
    if not by_token:
        return found
    return [replace(quality, kl_by_token=tuple(torch.cat(kl, 1))) for quality, kl in zip(found, kls, strict=True)]


def check_size(tokens: Tensor, first: int) -> None:
    """Raise FfnskipError when ``tokens [sequences, length]`` are too few to measure quality on from `first` on."""
    sequences, length = tokens.shape
    if sequences < 2:
        raise FfnskipError("Quality needs at least two sequences of text for a standard error: ask for more tokens.")
    if first > length - 2:
        raise FfnskipError(f"The warm-up of {first} tokens leaves nothing to measure in sequences of {length}.")


@torch.inference_mode()
def _score(
    model: PreTrainedModel,
    reference: PreTrainedModel,
    profiles: Sequence[Profile],
    ways: Sequence[Way | None],
    sequence: Tensor,
    firsts: Sequence[int],
    by_token: bool,
) -> list[tuple[list[float], dict[str, Any], list[list[float]]]]:
    """The figures of one ``sequence [length]`` with each profile, what was skipped in it, and its tokens' KL."""
    batch = sequence[None].to(input_device(model))
    dense = reference(batch, use_cache=False).logits[0]
    scores = []
    for profile, way, first in zip(profiles, ways, firsts, strict=True):
        working = at_work(model, profile, way, sequence)
        with working:
            logits = forward(model, batch, use_cache=False).logits[0]
        figures, kl = _compare(dense, logits, batch[0], first)
        scores.append((figures, asdict(working.stats), kl.tolist() if by_token else []))
    return scores


def _compare(dense: Tensor, logits: Tensor, tokens: Tensor, first: int) -> tuple[list[float], Tensor]:
    """Of positions ``first .. length - 2``: means of nll_dense, nll, kl, agreement; both KLs, ``[2, positions]``.

    Logits are ``[length, vocab]``.
    """
    sums, kls = torch.zeros(4, dtype=torch.float64), []
    positions = range(first, len(tokens) - 1)
    for start in range(positions.start, positions.stop, ROWS):
        rows = slice(start, min(start + ROWS, positions.stop))
        targets = tokens[rows.start + 1 : rows.stop + 1, None]
        p, q = (x[rows].float().log_softmax(dim=-1) for x in (dense, logits))
        kl = (p.exp() * (p - q)).sum(dim=-1)
        kls.append(torch.stack([kl, (q.exp() * (q - p)).sum(dim=-1)]))
        agree = p.argmax(dim=-1) == q.argmax(dim=-1)
        columns = (-p.gather(1, targets), -q.gather(1, targets), kl, agree)
        sums += torch.stack([column.double().sum() for column in columns]).cpu()
    return [float(x) for x in sums / len(positions)], torch.cat(kls, dim=1)


def _quality(table: list[list[float]], stats: SkipStats, tokens: int) -> Quality:
    columns = torch.tensor(table, dtype=torch.float64).T
    if not columns.isfinite().all():
        raise FfnskipError("The model's predictions are not finite numbers: try another --dtype, such as float32.")
    n = columns.shape[1]
    errors = columns.std(dim=1) / math.sqrt(n)
    nll_dense, nll, kl, top1_agreement, skip_ratio = (
        Estimate(float(mean), float(error)) for mean, error in zip(columns.mean(dim=1), errors, strict=True)
    )
    by_sequence = tuple(columns[_KL].tolist())
    return Quality(n, tokens, nll_dense, nll, kl, top1_agreement, skip_ratio, stats, by_sequence)


def _exp(nll: Estimate) -> Estimate:
    value = math.exp(min(nll.mean, _MAX_NLL))
    return Estimate(value, value * nll.standard_error)
