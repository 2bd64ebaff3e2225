"""What `ffnskip calibrate` says of what it does and of its results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ffnskip.compensation.kinds import compensation_name
from ffnskip.profiles.profile import Profile, save_profile
from ffnskip_cli import console
from ffnskip_cli.calibration.assemble import Calibrated, evaluation_text
from ffnskip_cli.calibration.lab import Step
from ffnskip_cli.calibration.settings import Goal
from ffnskip_cli.calibration.threshold.solve import PROMISED
from ffnskip_cli.commands import common
from ffnskip_cli.commands.options import Format
from ffnskip_cli.report.tables import Column, print_json, render, turned
from ffnskip_cli.report.words import explain, kinds_of, text_name, threshold_title
from ffnskip_cli.text.corpus import Corpus


def announce(steps: Sequence[Step]) -> None:
    """Say what is going to run."""
    planned = [f"{step.name} ({step.passes or step.decode_steps})" for step in steps]
    console.talk.print(f"Forward passes at most: {', '.join(planned)}.", markup=False)


def warn_of_shortfall(which: str, text: Corpus) -> None:
    """Say so if a text, or some of a mixture, had fewer whole sequences than were asked for."""
    if evaluation_text(text).fell_short:
        names = " + ".join(part.dataset for part in text.parts) or text.dataset
        console.warn(
            f"{text.tokens_requested} tokens of {which} text were asked for, and {names} has only {text.tokens_used}."
        )


def write(finished: list[Calibrated], path_of: dict[Goal, Path], format: Format) -> list[Path]:
    """Save the profiles, print what they hold, and return where they are."""
    paths = [path_of[calibrated.goal] for calibrated in finished]
    for calibrated, path in zip(finished, paths, strict=True):
        save_profile(calibrated.profile, path)
        console.talk.print(f"Wrote {path}.", markup=False)
    rows = [_row(calibrated, path) for calibrated, path in zip(finished, paths, strict=True)]
    if format == "json":
        profiles = [c.profile.model_dump(mode="json", by_alias=True) for c in finished]
        found = [row | {"profile": profile} for row, profile in zip(rows, profiles, strict=True)]
        print_json({"schema": "ffnskip-calibrate/v1", "profiles": found})
    elif format == "table":
        render(*turned(rows, _columns(finished, format)))
    else:
        render(rows, _columns(finished, format), format)
    if format in ("table", "md") and len(finished) == 1:
        _explain(finished[0].profile, format)
    for calibrated, path in zip(finished, paths, strict=True):
        _say_if_off_target(calibrated, path)
        common.warn_if_over_budget(calibrated.profile, path)
    return paths


def _explain(profile: Profile, format: Format) -> None:
    for sentence in explain(profile):
        print(f"- {sentence}" if format == "md" else sentence)
    print()


def _say_if_off_target(calibrated: Calibrated, path: Path) -> None:
    """The threshold is verified on the calibration text; on held-out text the ratio is another one."""
    profile = calibrated.profile
    found, text, held_out = profile.measured, profile.calibration, profile.evaluation
    assert found is not None
    assert text is not None
    assert held_out is not None
    error = found.standard_error["skip_ratio"]
    moved = f"{path} skips {found.skip_ratio:.3f} ± {error:.3f} of the FFNs on {text_name(held_out)}"
    if kinds_of(held_out) != kinds_of(text):
        console.talk.print(
            f"{moved}, and {calibrated.calibration_ratio:.3f} on {text_name(text)}, which it was calibrated on. That "
            f"the ratio moves is the rule at work: the threshold is on {profile.skip.by.decides_by}, not on how many "
            "are skipped, so text in which the FFNs have less to do skips more, and other text less.",
            markup=False,
        )
    elif found.target_ratio is not None and abs(found.skip_ratio - found.target_ratio) > PROMISED:
        console.warn(
            f"{moved}, not {found.target_ratio:g}: the unseen part of the text is unlike the part that was "
            "calibrated on, or too short to tell; more --tokens and --eval-tokens bring the two closer."
        )


def _row(calibrated: Calibrated, path: Path) -> dict[str, object]:
    profile = calibrated.profile
    assert profile.measured is not None
    goals = ("target_ratio", "target_flops", "max_kl", "max_perplexity_increase")
    return {
        "path": str(path),
        "goal": profile.measured.goal,
        **profile.measured.model_dump(include={*goals}),
        "calibration_ratio": calibrated.calibration_ratio,
        "rule": profile.skip.rule,
        "compensation": compensation_name(profile.compensation),
        "region": f"[{profile.skip.cold_s}, {profile.skip.cold_e})",
        **profile.skip.model_dump(include={"window", "refresh_every", "warm_up", "threshold"}),
        **profile.measured.model_dump(exclude={"standard_error", "first_skipped", *goals}),
    }


def _columns(finished: Sequence[Calibrated], format: Format) -> list[Column]:
    """All columns for programs; for people only those that mean something under the rule, which all profiles share."""
    skips = [calibrated.profile.skip for calibrated in finished]
    rule = skips[0].by
    meaningless = {"compensation", "never_skip_fraction"} if rule.leaves_out_parts else {"least_skipped"}
    left_out = (
        set() if rule.has_window else {"window", *(() if any(s.refresh_every for s in skips) else ["refresh_every"])}
    )
    left_out = set() if format == "csv" else left_out | meaningless
    columns = [
        Column("path", "profile"),
        Column("goal", "asked for"),
        Column("rule", "rule"),
        Column("compensation", "compensation"),
        Column("region", "skip region"),
        Column("window", "window"),
        Column("refresh_every", "refresh every"),
        Column("warm_up", "warm-up"),
        Column("threshold", threshold_title(skips[0]), ".3e" if rule.leaves_out_parts else ".6f"),
        Column("calibration_ratio", "ratio (calibration)", ".3f"),
        Column("skip_ratio", "ratio (held out)", ".3f"),
        Column("flops_saved", "FLOPs saved", ".1%"),
        Column("flops_saved_past_warm_up", "past warm-up", ".1%"),
        Column("never_skip_fraction", "never skip", ".1%"),
        Column("least_skipped", "least skipped", ".1%"),
        Column("perplexity_dense", "perplexity dense", ".2f"),
        Column("perplexity", "perplexity", ".2f"),
        Column("kl", "KL", ".3f"),
        Column("top1_agreement", "top-1 agreement", ".3f"),
    ]
    return [column for column in columns if column.key not in left_out]
