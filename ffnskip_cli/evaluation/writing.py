"""What can be said of two models' texts without a judge: how far they agree, and whether either has collapsed.

Figure 1 of FFN-SkipLLM (Jaiswal et al., EMNLP 2024) shows collapse: text that repeats itself. Here it is counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from ffnskip_cli.evaluation import errors
from ffnskip_cli.evaluation.documents import scorer
from ffnskip_cli.evaluation.figures import Pair
from ffnskip_cli.measure.quality import repetition

_LONGEST_UNIT, _FEWEST_ROUNDS, _SHORTEST_LOOP = 64, 3, 8  # tokens, times, tokens
Tokens = Sequence[int]


def distinct(tokens: Tokens, n: int) -> float:
    """Different n-grams / n-grams (distinct-n, Li et al. 2016); 1 where there are none."""
    ngrams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return len(set(ngrams)) / len(ngrams) if ngrams else 1.0


def ends_in_loop(tokens: Tokens) -> bool:
    """Whether the text ends with a run of up to 64 tokens three times over, eight tokens or more in all."""
    for unit in range(1, min(_LONGEST_UNIT, len(tokens) // _FEWEST_ROUNDS) + 1):
        rounds = max(_FEWEST_ROUNDS, -(-_SHORTEST_LOOP // unit))
        tail = list(tokens[len(tokens) - unit * rounds :])
        if len(tail) == unit * rounds <= len(tokens) and tail == tail[:unit] * rounds:
            return True
    return False


def token_agreement(dense: Tokens, skipping: Tokens) -> float:
    """Places at which both have the same token / places of the longer text; 1 where both are empty."""
    longer = max(len(dense), len(skipping))
    same = sum(a == b for a, b in zip(dense, skipping, strict=False))
    return same / longer if longer else 1.0


def rouge_l(dense: str, skipping: str) -> float:
    """F-measure of ROUGE-L between both; 1 for the same text, even one without a word."""
    return 1.0 if dense == skipping else float(scorer().score(dense, skipping)["rougeL"].fmeasure)


COLLAPSE: dict[str, Callable[[Tokens], float]] = {
    "length in tokens": len,
    "repeated 4-grams": lambda tokens: repetition(torch.tensor([list(tokens)])),
    "distinct-1": lambda tokens: distinct(tokens, 1),
    "distinct-2": lambda tokens: distinct(tokens, 2),
    "ends in a loop": lambda tokens: float(ends_in_loop(tokens)),
}


def rows(pairs: Sequence[Pair], tokenize: Callable[[str], Tokens]) -> list[dict[str, Any]]:
    """Of each task and part, the figures of `COLLAPSE`: means over its texts, dense and with the profile."""
    made = []
    for names, group in _by_part(pairs):
        dense, skipping = ([tokenize(getattr(pair, who)) for pair in group] for who in ("dense", "ffnskip"))
        for metric, figure in COLLAPSE.items():
            both = errors.paired([figure(text) for text in dense], [figure(text) for text in skipping])
            made.append(both.row(**names, metric=metric))
    return made


def agreement(pairs: Sequence[Pair], tokenize: Callable[[str], Tokens]) -> list[dict[str, Any]]:
    """Of each task and part, how far the profile's texts are the dense model's: means with their errors."""
    made = []
    for names, group in _by_part(pairs):
        values = {
            "rouge_l": [rouge_l(pair.dense, pair.ffnskip) for pair in group],
            "token_agreement": [token_agreement(tokenize(pair.dense), tokenize(pair.ffnskip)) for pair in group],
            "same": [float(pair.dense == pair.ffnskip) for pair in group],
        }
        figures = {name: errors.mean(column) for name, column in values.items()}
        cells = {name: figure.value for name, figure in figures.items()}
        made.append({**names, "texts": len(group), **cells, **{f"{n}_stderr": f.stderr for n, f in figures.items()}})
    return made


def _by_part(pairs: Sequence[Pair]) -> Iterator[tuple[dict[str, str], list[Pair]]]:
    groups: dict[tuple[str, str], list[Pair]] = {}
    for pair in pairs:
        if pair.written:
            groups.setdefault((pair.task, pair.part), []).append(pair)
    for (task, part), group in groups.items():
        yield {"task": task, "part": part}, group
