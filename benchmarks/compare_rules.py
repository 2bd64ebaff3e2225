"""Compare ways to skip at equal ratios on unseen text: the paper's rule, random, static, and a profile.

    python benchmarks/compare_rules.py demo 0.25.yaml -o docs/comparison

measures everything on the text that the profile was measured on, writes docs/comparison.json and .svg, and prints the
table as Markdown. All rows are scored in one run, in score mode, past the profile's warm-up.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

RATIOS = (0.05, 0.10, 0.15, 0.20, 0.25, 0.35, 0.50)
COLD_S, COLD_E = 2, 2  # of the paper's rule: layers at either end that it leaves alone
RULER = 16  # sequences of the same text on which thresholds of the paper's rule are solved
LABELS = {
    "paper": "the paper's rule",
    "window": "the same, one FFN per trigger",
    "random": "random FFNs",
    "static": "the same FFNs for every token",
    "profile": "ffnskip",
}


def main(
    model: Annotated[str, typer.Argument(help="The model.")],
    profile: Annotated[Path, typer.Argument(help="Its profile.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Files to write, without suffix.")],
    tokens: Annotated[int, typer.Option(help="Tokens to score.")] = 8192,
) -> None:
    """Measure, write OUTPUT.json and OUTPUT.svg, print a table."""
    from ffnskip.profiles.profile import load_profile
    from ffnskip_cli import console
    from ffnskip_cli.measure.flops import model_cost, overhead
    from ffnskip_cli.measure.quality import measure_quality
    from ffnskip_cli.sources.models import load_model
    from ffnskip_cli.text.named import dataset_names, evaluation_text, text_names

    ours = load_profile(profile)
    assert ours.evaluation is not None
    assert ours.calibration is not None
    loaded = load_model(model)
    text = evaluation_text(
        loaded,
        text_names(ours.evaluation),
        calibrated_on=dataset_names(ours.calibration),
        tokens=tokens,
        sequence_length=ours.evaluation.sequence_length,
        seed=ours.calibration.seed,
        offline=False,
    ).tokens
    variants = _variants(loaded.model, ours, text)
    qualities = measure_quality(
        loaded.model,
        [variant["profile"] for variant in variants],
        text,
        console.track,
        ways=[variant["pattern"] for variant in variants],
        what=f"measuring {len(variants)} points",
    )
    cost = model_cost(loaded.model)
    points = [
        {
            "way": variant["way"],
            "skip_ratio": quality.skip_ratio.mean,
            "flops_saved": cost.saved_share(
                quality.stats, overhead(variant["profile"], loaded.model), quality.sequences, text.shape[1]
            ),
            "kl": quality.kl.mean,
            "kl_standard_error": quality.kl.standard_error,
            "perplexity": quality.perplexity.mean,
            "top1_agreement": quality.top1_agreement.mean,
            "never_skip_fraction": quality.stats.never_skip_fraction,
        }
        for variant, quality in zip(variants, qualities, strict=True)
    ]
    dense = qualities[0].perplexity_dense.mean
    document = {"model": ours.model.id, "text": text_names(ours.evaluation), "tokens": text.numel()}
    document |= {"warm_up": ours.skip.warm_up, "perplexity_dense": dense, "points": points}
    output.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")
    _draw(points, dense, ours.model.id, output.with_suffix(".svg"))
    _print_table(points, dense)


def _variants(model: Any, ours: Any, text: Any) -> list[dict[str, Any]]:
    """Every way at every ratio that it reaches."""
    from ffnskip_cli.calibration.recording.record import record_text
    from ffnskip_cli.calibration.threshold.solve import highest_ratio, solve_threshold
    from ffnskip_cli.measure.baselines import bare_profile, baseline_patterns
    from ffnskip_cli.progress import silently

    bare = bare_profile(ours, max(RATIOS))
    n_layers = ours.model.n_layers
    record = record_text(model, text[:RULER].long())
    variants = []
    for way, window in (("paper", None), ("window", 1)):
        region = {"cold_s": COLD_S, "cold_e": n_layers - COLD_E, "window": window}
        skip = bare.skip.model_copy(update=region)
        reachable = [ratio for ratio in RATIOS if ratio <= highest_ratio(record, skip)]
        for ratio in reachable:
            solved = skip.model_copy(update={"threshold": solve_threshold(record, skip, ratio)})
            variants.append({"way": way, "profile": bare.model_copy(update={"skip": solved}), "pattern": None})
    for ratio in RATIOS:
        patterns = baseline_patterns(model, bare, ratio, text[:RULER], silently)
        variants += [{"way": way, "profile": bare, "pattern": patterns[way]} for way in ("random", "static")]
    low, high = min(point.skip_ratio for point in ours.curve), max(point.skip_ratio for point in ours.curve)
    variants += [
        {"way": "profile", "profile": ours.at_ratio(ratio), "pattern": None} for ratio in RATIOS if low <= ratio <= high
    ]
    return variants


def _print_table(points: list[dict[str, Any]], dense: float) -> None:
    print(f"| way | skip ratio | FLOPs saved, net | KL | perplexity (dense {dense:.1f}) | top-1 agreement |")
    print("|---|---|---|---|---|---|")
    for point in points:
        print(
            f"| {LABELS[point['way']]} | {point['skip_ratio']:.3f} | {point['flops_saved']:.1%} | {point['kl']:.3f} "
            f"| {point['perplexity']:.4g} | {point['top1_agreement']:.3f} |"
        )


def _draw(points: list[dict[str, Any]], dense: float, title: str, path: Path) -> None:
    from matplotlib import style
    from matplotlib.figure import Figure

    from ffnskip_cli.report.plot import METADATA, STYLE

    with style.context(STYLE):
        figure = Figure(figsize=(9.5, 4.2), layout="constrained")
        left, right = figure.subplots(1, 2)
        for axes, name, label in ((left, "kl", "KL from dense, nats per token"), (right, "perplexity", "perplexity")):
            for way, marker in zip(LABELS, "sDx^o", strict=True):
                pairs = sorted((p["skip_ratio"], p[name]) for p in points if p["way"] == way)
                axes.plot(
                    *zip(*pairs, strict=True), marker=marker, label=LABELS[way], lw=2.5 if way == "profile" else 1
                )
            axes.set(xlabel="skip ratio", ylabel=label, yscale="log")
            axes.grid(alpha=0.3)
        right.axhline(dense, color="black", linestyle=":", label="dense")
        figure.legend(*right.get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
        left.set_title(title, loc="left", fontsize="medium", parse_math=False)
        figure.savefig(path, metadata=METADATA[".svg"])


if __name__ == "__main__":
    typer.run(main)
