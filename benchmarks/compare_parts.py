"""Compare ways to leave out FLOPs at equal savings: the rule `price`, its relatives, and whole FFNs.

    python benchmarks/compare_parts.py demo price.yaml --text wikitext-2-valid.txt \\
        --whole profiles/smollm2-135m-instruct/0.25.yaml -o parts.json

scores each way at several settings, past the profile's warm-up, and prints KL, perplexity and top-1 agreement at equal
shares of all FLOPs past warm-up, interpolated between the settings. Nothing is fitted to the text: prices, quantiles
and the greedy search come from the calibration text of the profile. Ways that OUTPUT holds are not measured again.
"""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import typer

TARGETS = (0.05, 0.10, 0.15, 0.20, 0.25, 0.30, 0.40)
SETTINGS = (0.045, 0.10, 0.15, 0.20, 0.25, 0.30, 0.35, 0.43)  # shares of FLOPs that the relatives are set to
PRICES = (0.03, 0.2, 0.5, 1.0, 1.7, 2.7, 4.2, 7.5)  # times the threshold of the profile
RATIOS = (0.08, 0.15, 0.25, 0.35, 0.45, 0.50)  # of whole FFNs
SAMPLE, SEARCHED = 2048, 2  # tokens that quantiles are taken of; sequences of the greedy search
SCORES = {"teal": "magnitude", "wina": "with weights", "cats": "gate"}
LABELS = {
    "price": "`price`",
    "teal": "TEAL, uniform",
    "teal-greedy": "TEAL, greedy",
    "wina": "WINA, uniform",
    "wina-greedy": "WINA, with TEAL's greedy search",
    "cats": "CATS",
    "whole": "whole FFNs, `predicted-damage`",
}


def main(
    model: Annotated[str, typer.Argument(help="The model.")],
    profile: Annotated[Path, typer.Argument(help="Its profile of the rule price.")],
    text: Annotated[str, typer.Option(help="What to score: a file or a dataset.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the points are kept, JSON.")],
    whole: Annotated[Path | None, typer.Option(help="Its profile of the rule predicted-damage, with a curve.")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens to score.")] = 4096,
    ways: Annotated[str, typer.Option(help="What to measure, separated by commas.")] = ",".join(LABELS),
    dtype: Annotated[str, typer.Option(help="Of the model.")] = "float32",
) -> None:
    """Measure, write OUTPUT, print three tables."""
    from ffnskip.profiles.profile import load_profile
    from ffnskip_cli.sources.models import load_model

    priced = load_profile(profile)
    other = None if whole is None else load_profile(whole)
    assert priced.calibration is not None
    loaded, length = load_model(model, dtype=dtype), priced.calibration.sequence_length
    scored = _text(loaded, text, tokens, length)
    sample = _text(loaded, priced.calibration.dataset, SAMPLE, length)
    points: list[dict[str, Any]] = json.loads(output.read_text()) if output.exists() else []
    for way in ways.split(","):
        if any(point["way"] == way for point in points) or (other is None and way == "whole"):
            continue
        points += _measured(way, loaded.model, _variants(way, loaded.model, priced, other, sample), scored)
        output.write_text(json.dumps(points, indent=1) + "\n")
    for name, form in (("kl", ".4f"), ("perplexity_ratio", ".3f"), ("top1_agreement", ".3f")):
        _print_table(points, name, form)


def _text(loaded: Any, name: str, tokens: int, length: int) -> Any:
    """``[sequences, length]``; of the demo text the part that profiles are calibrated on."""
    from ffnskip_cli.text.corpus import Ingredient, build_mixture
    from ffnskip_cli.text.named import open_all, sampled_from

    sources = open_all([name], sampled_from(loaded, "0"), False)
    part = "calibration" if name == "demo" else "all"
    ingredients = [Ingredient(source, part, weight) for source, weight in sources]
    return build_mixture(ingredients, loaded.tokenizer, tokens=tokens, sequence_length=length, seed=0).tokens


def _variants(way: str, model: Any, priced: Any, other: Any, sample: Any) -> list[tuple[Any, Any]]:
    """Profiles, each with what decides in the place of its rule or None."""
    from ffnskip_cli.measure.flops import model_cost
    from ffnskip_cli.measure.part_baselines import Quantiles, between, greedy_paths
    from ffnskip_cli.measure.thinning import Thinning
    from ffnskip_cli.progress import silently

    if way == "price":
        return [(priced.with_threshold(priced.skip.threshold * factor), None) for factor in PRICES]
    if way == "whole":
        return [(other.with_skip(warm_up=priced.skip.warm_up).at_ratio(ratio), None) for ratio in RATIOS]
    name, _, greedy = way.partition("-")
    score, first, length = SCORES[name], priced.skip.warm_up, sample.shape[1]
    quantiles = Quantiles(model, score, sample, first, silently)
    per_token = model_cost(model).dense_flops(first, length) / (length - first)
    sparsities = [sparsity for saved in SETTINGS if (sparsity := saved * per_token / quantiles.flops()) < 1]
    if not greedy:
        limits = [quantiles.uniform(sparsity) for sparsity in sparsities]
    else:
        paths = greedy_paths(model, quantiles, sparsities[-1], sample[:SEARCHED], first, silently)
        limits = [quantiles.at([between(path, sparsity) for path in paths]) for sparsity in sparsities]
    return [(priced, Thinning(score, one)) for one in limits]


def _measured(way: str, model: Any, variants: list[tuple[Any, Any]], text: Any) -> list[dict[str, Any]]:
    from ffnskip_cli import console
    from ffnskip_cli.measure.flops import model_cost, overhead
    from ffnskip_cli.measure.quality import measure_quality

    profiles, ways = [profile for profile, _ in variants], [own for _, own in variants]
    qualities = measure_quality(model, profiles, text, console.track, ways=ways, what=f"measuring {way}")
    cost = model_cost(model)
    return [
        {
            "way": way,
            "saved": cost.saved_share_past(q.stats, overhead(profile, model), q.sequences, text.shape[1]),
            "skip_ratio": q.skip_ratio.mean,
            "kl": q.kl.mean,
            "kl_standard_error": q.kl.standard_error,
            "perplexity_ratio": q.perplexity.mean / q.perplexity_dense.mean,
            "top1_agreement": q.top1_agreement.mean,
        }
        for profile, q in zip(profiles, qualities, strict=True)
    ]


def _print_table(points: list[dict[str, Any]], name: str, form: str) -> None:
    print(f"\n| {name} at | {' | '.join(f'{target:.2f}' for target in TARGETS)} |")
    print("|---" * (len(TARGETS) + 1) + "|")
    for way, label in LABELS.items():
        rows = sorted((point["saved"], point[name]) for point in points if point["way"] == way)
        cells = [_between(rows, target, by_powers=name == "kl") for target in TARGETS]
        if rows:
            print(f"| {label} | " + " | ".join("–" if cell is None else format(cell, form) for cell in cells) + " |")


def _between(rows: list[tuple[float, float]], target: float, by_powers: bool) -> float | None:
    """Linear between neighbours, or a power of what is saved, as KL about is; None beyond the ends."""
    for (low, a), (high, b) in pairwise(rows):
        if low <= target <= high:
            if by_powers and min(low, a) > 0:
                return a * (target / low) ** (math.log(b / a) / math.log(high / low))
            return a + (target - low) / (high - low) * (b - a)
    return None


if __name__ == "__main__":
    typer.run(main)
