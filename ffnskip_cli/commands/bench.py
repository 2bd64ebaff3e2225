"""`ffnskip bench`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ffnskip_cli import console
from ffnskip_cli.commands import options

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ffnskip.profiles.profile import Profile
    from ffnskip_cli.report.tables import Column
    from ffnskip_cli.text.corpus import Corpus

NOISY = 0.25  # of the median; beyond it a difference of a few per cent between rows cannot be seen


Measure = Annotated[
    str, typer.Option(metavar="PART[,PART…]", help="What to measure: quality, baselines, speed, worst-case.")
]
EvalDatasets = Annotated[
    list[str] | None,
    typer.Option(
        "--eval-dataset",
        metavar="TEXT",
        help="Text to measure on; several are mixed, TEXT=3 weighs three times as much. Default: what the profile was "
        "measured on.",
        show_default=False,
    ),
]
EvalTokens = Annotated[int, typer.Option(metavar="N", min=1, help="Tokens to measure quality on.")]
PromptTokens = Annotated[int, typer.Option(metavar="N", min=1, help="Tokens of each prompt.")]
NewTokens = Annotated[int, typer.Option(metavar="N", min=2, help="Tokens to generate from each prompt.")]
Prompts = Annotated[int, typer.Option(metavar="N", min=1, help="Prompts of the worst-case part.")]
Repetitions = Annotated[int, typer.Option("--repetitions", "-r", metavar="N", min=1, help="Timed runs per row.")]
Breakdown = Annotated[bool, typer.Option("--breakdown", help="Show where the time of a token goes.")]
Seed = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=0,
        max=options.MAX_SEED,
        help="Order of the text; default: the calibration's.",
        show_default=False,
    ),
]
Format = Annotated[Literal["table", "md", "json", "csv"], typer.Option(help="How to print the result.")]


def command(
    model: options.ModelName,
    profile: options.ProfilePath,
    threshold: options.Threshold = None,
    target: options.Target = None,
    measure: Measure = "quality,baselines,speed,worst-case",
    eval_dataset: EvalDatasets = None,
    eval_tokens: EvalTokens = 8192,
    prompt_tokens: PromptTokens = 128,
    new_tokens: NewTokens = 256,
    prompts: Prompts = 16,
    repetitions: Repetitions = 5,
    seed: Seed = None,
    format: Format = "table",
    breakdown: Breakdown = False,
    dtype: options.Dtype = "auto",
    weights: options.WeightFormat = "auto",
    device: options.Device = "auto",
    device_map: options.DeviceMap = None,
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    offline: options.Offline = False,
) -> None:
    """Measure what a profile saves and what it costs.

    Quality is perplexity, KL and top-1 agreement with the dense model on held-out text. The baselines skip as many
    FFNs on that text by simpler means: at random, the same ones for every token (non-adaptive: evenly spread; static:
    where the FFN changes its input least; shortgpt: where the layer does), or more of them the later the token
    (skipdecode). Speed is tokens per second at batch 1: the dense model, the profile and Hugging Face generate take
    turns in one process. The worst case is the share of generated tokens that skip nothing at all. With --weights all
    rows but Hugging Face's run on packed weights, and quality is compared with the model as it was loaded.
    """
    from ffnskip.profiles.profile import load_profile

    loaded_profile = load_profile(profile).moved(threshold=threshold, target=target)
    parts = _parse_parts(measure)
    with console.busy("Starting"):
        from ffnskip_cli.measure.suite import Plan, run_suite
        from ffnskip_cli.text.named import check_names, dataset_names, evaluation_text

    calibration = loaded_profile.calibration
    names = eval_dataset or _measured_on(loaded_profile)
    check_names(names, offline)
    loaded = options.load(
        model,
        dtype=dtype,
        device=device,
        device_map=device_map,
        revision=revision,
        trust_remote_code=trust_remote_code,
        offline=offline,
    )
    measured, original = _packed(loaded.model, weights)
    path = _proved(measured, loaded_profile)
    sequence_length = _sequence_length(loaded_profile, prompt_tokens)
    decoded = prompt_tokens + new_tokens if parts & {"speed", "worst-case"} else 0
    options.refuse_longer(loaded.model, max(sequence_length, decoded), "lower --prompt-tokens and --new-tokens")
    with console.busy("Preparing text"):
        text = evaluation_text(
            loaded,
            names,
            calibrated_on=dataset_names(calibration) if calibration else (),
            tokens=eval_tokens,
            sequence_length=sequence_length,
            seed=seed if seed is not None else (calibration.seed if calibration else 0),
            offline=offline,
        )
    options.say_expected_cost(loaded_profile, threshold, target)
    _warn_if_text_changed(loaded_profile, text, seed, eval_dataset)
    plan = Plan(parts, prompt_tokens, new_tokens, repetitions, prompts)
    document: dict[str, Any] = {
        "schema": "ffnskip-bench/v1",
        "model": loaded.id,
        "profile": str(profile),
        "threshold": loaded_profile.skip.threshold,
        "device": loaded.placement,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "weights": weights,
        "path": path,
        "eval_dataset": " + ".join(names),
        "eval_tokens": text.tokens_used,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "prompts": min(prompts, len(text.tokens)),
        "repetitions": repetitions,
        "rows": run_suite(measured, loaded_profile, text.tokens, plan, console.track, original=original),
    }
    _print(document, format)
    if breakdown:
        _print_breakdown(document["rows"], format)
    _warn_if_noisy(document["rows"])


def _packed(
    model: PreTrainedModel, weights: Literal["auto", "int8", "int4"]
) -> tuple[PreTrainedModel, PreTrainedModel | None]:
    """The model to measure, and what it was packed from if it was: users compare with that."""
    if weights == "auto":
        return model, None
    from copy import deepcopy

    from ffnskip import pack_weights

    with console.busy(f"Packing weights to {weights}"):
        pack_weights(packed := deepcopy(model), weights)
    return packed, model


def _proved(model: PreTrainedModel, profile: Profile) -> str:
    """Check profile and model before the long part; which path they will decode by."""
    from ffnskip import Decoder

    decoder = Decoder(model, profile)
    options.say_path(decoder)
    return decoder.path


def _warn_if_noisy(rows: list[dict[str, Any]]) -> None:
    speeds = [row["tokens_per_second"] for row in rows if row["tokens_per_second"]]
    spreads = [(speed["max"] - speed["min"]) / speed["median"] for speed in speeds]
    impossible = [row["name"] for row in rows if row["speedup"] is not None and row["speedup"] > row["ceiling"] * 1.02]
    if set(impossible) - {"hf-dense"}:
        console.warn("The speed-up is above the ceiling, which only noise can do: repeat with more repetitions.")
    elif max(spreads, default=0.0) > NOISY:
        console.warn(
            f"The runs of one row differ by up to {max(spreads):.0%} of their median: the machine is busy, so the "
            "speeds and the speed-up mean little. Repeat on a quiet machine or with more repetitions."
        )


def _warn_if_text_changed(profile: Profile, text: Corpus, seed: int | None, eval_dataset: list[str] | None) -> None:
    """Point out that a dataset has moved on since the profile was measured on it."""
    then = profile.evaluation
    if then is None or seed is not None or eval_dataset:
        return
    same_size = (then.tokens_requested, then.sequence_length) == (text.tokens_requested, text.tokens.shape[1])
    if not same_size:
        return
    hashes = [part.text_sha256 for part in text.parts] or [text.text_sha256]
    for old, sha256 in zip(then.parts or (then,), hashes, strict=True):
        if old.text_sha256 != sha256:
            console.warn(f"{old.dataset} holds other text now than when the profile was measured on it.")


def _measured_on(profile: Profile) -> list[str]:
    from ffnskip.errors import FfnskipError
    from ffnskip_cli.text.named import text_names

    if profile.evaluation is None:
        raise FfnskipError("The profile does not say what text it was measured on: name one with --eval-dataset.")
    return text_names(profile.evaluation)


def _parse_parts(measure: str) -> frozenset[str]:
    from ffnskip.errors import FfnskipError
    from ffnskip_cli.measure.suite import PARTS

    parts = frozenset(part.strip() for part in measure.split(","))
    if unknown := parts - set(PARTS):
        raise FfnskipError(f"--measure cannot measure {sorted(unknown)[0]!r}: choose from {', '.join(PARTS)}.")
    if "baselines" in parts and "quality" not in parts:
        raise FfnskipError("--measure baselines needs the part quality as well: they skip as much as the profile does.")
    return parts


def _sequence_length(profile: Profile, prompt_tokens: int) -> int:
    """That of the profile's own measurement, if a prompt fits into it."""
    measured = profile.evaluation.sequence_length if profile.evaluation else 256
    return max(measured, prompt_tokens)


def _print(document: dict[str, Any], format: Literal["table", "md", "json", "csv"]) -> None:
    from ffnskip_cli.report.tables import print_json, render, turned

    if format == "json":
        print_json(document)
        return
    rows = [row | {"tokens_per_second": (row["tokens_per_second"] or {}).get("median")} for row in document["rows"]]
    if format == "table":
        render(*turned(rows, _columns()))
    else:
        render(rows, _columns(), format)


def _print_breakdown(rows: list[dict[str, Any]], format: Literal["table", "md", "json", "csv"]) -> None:
    from ffnskip_cli.report.tables import Column, render

    timed = [{"name": row["name"]} | row["breakdown"] for row in rows if row["breakdown"]]
    if format == "json":  # it is in the document
        return
    if not timed:
        console.warn("Where the time goes is known of the fused path on a CPU alone, and when speed is measured.")
        return
    columns = [Column("name", "ms per token"), *(Column(part, part, ".2f") for part in timed[0] if part != "name")]
    render(timed, columns, format)


def _columns() -> list[Column]:
    from ffnskip_cli.report.tables import Column

    return [
        Column("name", "row"),
        Column("skip_ratio", "skip ratio", ".3f"),
        Column("flops_per_token", "FLOPs/token", ".3g"),
        Column("flops_saved", "FLOPs saved", ".1%"),
        Column("never_skip_fraction", "never skip", ".1%"),
        Column("tokens_per_second", "tokens/s", ".1f"),
        Column("decode_skip_ratio", "timed ratio", ".3f"),
        Column("speedup", "speed-up", ".2f"),
        Column("ceiling", "ceiling", ".2f"),
        Column("perplexity", "perplexity", ".2f"),
        Column("kl", "KL", ".3f"),
        Column("top1_agreement", "top-1 agreement", ".3f"),
        Column("repetition", "repetition", ".3f"),
    ]
