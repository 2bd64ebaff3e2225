"""`ffnskip calibrate`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ffnskip_cli import console
from ffnskip_cli.commands import options

if TYPE_CHECKING:
    from ffnskip.profile import Profile
    from ffnskip_cli.calibration.calibrate import Calibrated
    from ffnskip_cli.calibration.corpus import Corpus
    from ffnskip_cli.report.tables import Column

Dataset = Annotated[
    str | None,
    typer.Option(
        metavar="TEXT",
        help="Text to calibrate on: wikitext, c4, gsm8k, any Hub dataset (id[:config[:split]]), a local .txt, .jsonl "
        "or .parquet file, demo (also demo:wiki, demo:c4), or self (sampled from the model). Default: wikitext; demo "
        "for the demo model.",
        show_default=False,
    ),
]
EvalDataset = Annotated[
    str | None,
    typer.Option(
        metavar="TEXT", help="Text to measure quality on; default: a held-out part of --dataset.", show_default=False
    ),
]
Target = Annotated[
    str, typer.Option(metavar="RATIO[,RATIO…]", help="Share of all FFNs to skip, such as 0.10; several share one run.")
]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        metavar="PATH",
        help="The .yaml file to write, or a folder for RATIO.yaml files. Default: profiles/MODEL/.",
        show_default=False,
    ),
]
Window = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=1,
        help="FFNs skipped after a trigger at most. Default: all up to --cold-e.",
        show_default=False,
    ),
]
RefreshEvery = Annotated[
    int | None, typer.Option(metavar="N", min=2, help="Run every N-th token dense. Default: never.", show_default=False)
]
ColdStart = Annotated[
    int | None,
    typer.Option(
        metavar="LAYER", min=0, help="First layer of the skip region. Default: from the curve.", show_default=False
    ),
]
ColdEnd = Annotated[
    int | None,
    typer.Option(
        metavar="LAYER", min=1, help="Layer behind the skip region. Default: from the curve.", show_default=False
    ),
]


def command(
    model: options.ModelName,
    target: Target,
    dataset: Dataset = None,
    eval_dataset: EvalDataset = None,
    output: Output = None,
    on: Annotated[
        Literal["text", "generated"],
        typer.Option(help="Record on the text, in one fast pass, or on what the model generates from it."),
    ] = "text",
    tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Tokens to calibrate on.")] = 16384,
    eval_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Tokens to measure quality on.")] = 8192,
    sequence_length: Annotated[int, typer.Option(metavar="N", min=2, help="Tokens per sequence.")] = 256,
    warm_up: Annotated[
        int, typer.Option(metavar="N", min=0, help="Generated tokens that run dense before skipping starts.")
    ] = 25,
    window: Window = None,
    refresh_every: RefreshEvery = None,
    cold_s: ColdStart = None,
    cold_e: ColdEnd = None,
    seed: options.Seed = 0,
    format: Annotated[Literal["table", "json", "md", "csv"], typer.Option(help="How to print the result.")] = "table",
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    offline: options.Offline = False,
) -> None:
    """Measure a model on text and write a skip profile.

    Records how much each layer's feed-forward block (FFN) turns the residual stream, finds the cold regions, solves the
    threshold for the target ratio, verifies it in the running model, and measures what it costs on held-out text.
    """
    targets = _parse_targets(target)
    paths = _paths(output, model, targets)

    with console.busy("Starting"):
        from ffnskip.errors import FfnskipError
        from ffnskip.identity import model_info
        from ffnskip_cli.calibration.calibrate import calibrate
        from ffnskip_cli.calibration.settings import Settings
        from ffnskip_cli.calibration.texts import calibration_and_held_out

    dataset = dataset or ("demo" if model == "demo" else "wikitext")
    settings = Settings(
        targets=targets,
        tokens=tokens,
        eval_tokens=eval_tokens,
        sequence_length=sequence_length,
        warm_up=warm_up,
        window=window,
        refresh_every=refresh_every,
        cold_s=cold_s,
        cold_e=cold_e,
        on=on,
        seed=seed,
    )
    loaded = options.load(
        model, dtype=dtype, device=device, revision=revision, trust_remote_code=trust_remote_code, offline=offline
    )
    options.refuse_longer(loaded.model, sequence_length, "lower --sequence-length")
    with console.busy("Preparing text"):
        text, held_out = calibration_and_held_out(loaded, dataset, eval_dataset, settings, offline)
    _warn_of_shortfall("calibration", text)
    _warn_of_shortfall("evaluation", held_out)
    identity = model_info(loaded.model, id=loaded.id, revision=loaded.revision, gguf_sha256=loaded.gguf_sha256)
    result = calibrate(loaded.model, identity, text, held_out, settings, console.track)
    if result.finished:
        written = _write(result.finished, dict(zip(targets, paths, strict=True)), format)
        options.hint_command("bench", model, "--profile", written[0])
    if result.refused:
        raise FfnskipError(" ".join(result.refused))


def _parse_targets(target: str) -> tuple[float, ...]:
    from ffnskip.errors import FfnskipError

    try:
        ratios = tuple(float(part) for part in target.split(","))
    except ValueError:
        raise FfnskipError(f"--target {target} is not a ratio such as 0.10, or several with commas between.") from None
    for ratio in ratios:
        if not 0.0 < ratio < 1.0:
            raise FfnskipError(f"--target {ratio:g} is not a ratio between 0 and 1, such as 0.10.")
    if len({f"{ratio:g}" for ratio in ratios}) < len(ratios):
        raise FfnskipError(f"--target {target} names a ratio twice.")
    return ratios


def _paths(output: Path | None, model: str, targets: tuple[float, ...]) -> list[Path]:
    """Where each target's profile goes; checked now, because the run is long."""
    from ffnskip.errors import FfnskipError

    if output is None:
        name = os.path.basename(os.path.abspath(model.partition("@")[0]))
        output = Path("profiles", name.lower().removesuffix(".gguf"))
    if output.suffix in (".yaml", ".yml"):
        if len(targets) > 1:
            raise FfnskipError(f"{output} is one file, but there are {len(targets)} targets: name a folder instead.")
        paths = [output]
    else:
        paths = [output / f"{ratio:{'.2f' if round(ratio, 2) == ratio else 'g'}}.yaml" for ratio in targets]
    for path in paths:
        _refuse_unwritable(path)
    return paths


def _refuse_unwritable(path: Path) -> None:
    from ffnskip.errors import FfnskipError

    try:
        if path.is_dir():
            raise FfnskipError(f"{path} is a folder: name another --output.")
        above = next(folder for folder in path.absolute().parents if folder.exists())
        writable = above.is_dir() and os.access(above, os.W_OK)
    except OSError:  # such as a name that is too long
        writable = False
    if not writable:
        raise FfnskipError(f"{path} cannot be written: name another --output.")


def _warn_of_shortfall(which: str, text: Corpus) -> None:
    from ffnskip_cli.calibration.assemble import evaluation_text

    if evaluation_text(text).fell_short:
        console.warn(
            f"{text.tokens_requested} tokens of {which} text were asked for, and {text.dataset} has only "
            f"{text.tokens_used}."
        )


def _write(
    finished: list[Calibrated], path_of: dict[float, Path], format: Literal["table", "json", "md", "csv"]
) -> list[Path]:
    """Save the profiles, print what they hold, and return where they are."""
    from ffnskip.profile import save_profile
    from ffnskip_cli.report.tables import print_json, render, turned

    paths = [path_of[c.profile.measured.target_ratio] for c in finished if c.profile.measured is not None]
    for calibrated, path in zip(finished, paths, strict=True):
        save_profile(calibrated.profile, path)
        console.talk.print(f"Wrote {path}.", markup=False)
    rows = [_row(calibrated, path) for calibrated, path in zip(finished, paths, strict=True)]
    if format == "json":
        profiles = [c.profile.model_dump(mode="json", by_alias=True) for c in finished]
        found = [row | {"profile": profile} for row, profile in zip(rows, profiles, strict=True)]
        print_json({"schema": "ffnskip-calibrate/v1", "profiles": found})
    elif format == "table":
        render(*turned(rows, _columns()))
    else:
        render(rows, _columns(), format)
    for calibrated, path in zip(finished, paths, strict=True):
        _warn_if_off_target(calibrated.profile, path)
        options.warn_if_over_budget(calibrated.profile, path)
    return paths


def _warn_if_off_target(profile: Profile, path: Path) -> None:
    """The threshold is verified on the calibration text; on held-out text the ratio is another one."""
    from ffnskip_cli.calibration.verify import PROMISED

    found = profile.measured
    assert found is not None
    if abs(found.skip_ratio - found.target_ratio) > PROMISED:
        console.warn(
            f"{path} skips {found.skip_ratio:.3f} of the FFNs on the held-out text, not {found.target_ratio:g}: that "
            "text is easier or harder, or too short to tell; more --tokens and --eval-tokens bring the two closer."
        )


def _row(calibrated: Calibrated, path: Path) -> dict[str, object]:
    profile = calibrated.profile
    assert profile.measured is not None
    return {
        "path": str(path),
        "calibration_ratio": calibrated.calibration_ratio,
        "region": f"[{profile.skip.cold_s}, {profile.skip.cold_e})",
        "threshold": profile.skip.threshold,
        **profile.measured.model_dump(exclude={"standard_error"}),
    }


def _columns() -> list[Column]:
    from ffnskip_cli.report.tables import Column

    return [
        Column("path", "profile"),
        Column("target_ratio", "target", "g"),
        Column("region", "skip region"),
        Column("threshold", "threshold", ".6f"),
        Column("calibration_ratio", "ratio (calibration)", ".3f"),
        Column("skip_ratio", "ratio (held out)", ".3f"),
        Column("flops_saved", "FLOPs saved", ".1%"),
        Column("never_skip_fraction", "never skip", ".1%"),
        Column("perplexity_dense", "perplexity dense", ".2f"),
        Column("perplexity", "perplexity", ".2f"),
        Column("kl", "KL", ".3f"),
        Column("top1_agreement", "top-1 agreement", ".3f"),
    ]
