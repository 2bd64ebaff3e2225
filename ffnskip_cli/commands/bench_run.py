"""What `ffnskip bench` does."""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING, Any

from ffnskip.decoder import Decoder
from ffnskip.errors import FfnskipError
from ffnskip.model.packed import pack_weights
from ffnskip.profiles.profile import Profile
from ffnskip_cli import console
from ffnskip_cli.commands import common
from ffnskip_cli.commands.bench import Options
from ffnskip_cli.commands.options import Format, Weights
from ffnskip_cli.measure.speed import pair_ratios
from ffnskip_cli.measure.suite import PARTS, Plan, run_suite
from ffnskip_cli.report.tables import Column, print_json, render, turned
from ffnskip_cli.sources.models import LoadedModel
from ffnskip_cli.text.corpus import Corpus
from ffnskip_cli.text.named import check_names, dataset_names, evaluation_text, text_names

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

SLOWER = 0.98  # of the dense speed; the two per cent above it are what a profile may cost that skips nothing
NOISY = 0.25  # of the median; beyond it a difference of a few per cent between rows cannot be seen


def run(options: Options) -> None:
    """Measure the profile in one process and print a row for each way to run the model."""
    parts, prompt_tokens, new_tokens = _parse_parts(options.measure), options.prompt_tokens, options.new_tokens
    weights, offline = options.model_options.weights, options.model_options.offline
    loaded, profile, profile_name = common.load_pair(
        options.model,
        options.profile,
        options.move,
        options.model_options,
        other_weights=options.other_weights,
        refuse=lambda profile: check_names(_text_names(options, profile), offline),
    )
    names = _text_names(options, profile)
    measured, original = _packed(loaded.model, weights)
    decoder = Decoder(measured, profile, other_weights=True)  # checks path and profile before the long part
    common.say_path(decoder)
    length = _sequence_length(profile, prompt_tokens)
    decoded = prompt_tokens + new_tokens if parts & {"speed", "worst-case"} else 0
    common.refuse_longer(loaded.model, max(length, decoded), "lower --prompt-tokens and --new-tokens")
    text = _text(loaded, profile, names, options, length, options.eval_tokens)
    common.say_expected_cost(profile, options.move)
    _warn_if_text_changed(profile, text, options)
    timed_text = _timed_text(loaded, profile, names, options, text) if "speed" in parts else None
    plan = Plan(parts, prompt_tokens, new_tokens, options.repetitions, options.prompts)
    document: dict[str, Any] = {
        "schema": "ffnskip-bench/v1",
        "model": loaded.id,
        "profile": profile_name,
        "threshold": profile.skip.threshold,
        "device": loaded.placement,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "weights": weights,
        "path": decoder.path,
        "eval_dataset": " + ".join(names),
        "eval_tokens": text.tokens_used,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "new_tokens_past_warm_up": max(new_tokens - 1 - profile.skip.warm_up, 0),  # nothing follows the last one
        "timed_on": options.timed_on,
        "prompts": min(options.prompts, len(text.tokens)),
        "repetitions": options.repetitions,
        "rows": run_suite(
            measured, decoder, text.tokens, plan, console.track, timed_text=timed_text, original=original
        ),
    }
    _print(document, options.format)
    if options.breakdown:
        _print_breakdown(document["rows"], options.format)
    _warn_if_noisy(document["rows"])
    _warn_if_slower(document["rows"], options.timed_on)


def _text(
    loaded: LoadedModel, profile: Profile, names: list[str], options: Options, length: int, tokens: int
) -> Corpus:
    """The text to measure on, apart from what was calibrated on, in sequences of that length."""
    calibration = profile.calibration
    usual_seed = calibration.seed if calibration else 0
    with console.busy("Preparing text"):
        return evaluation_text(
            loaded,
            names,
            calibrated_on=dataset_names(calibration) if calibration else (),
            tokens=tokens,
            sequence_length=length,
            seed=usual_seed if options.seed is None else options.seed,
            offline=options.model_options.offline,
        )


def _timed_text(
    loaded: LoadedModel, profile: Profile, names: list[str], options: Options, text: Corpus
) -> Tensor | None:
    """``[sequences, prompt + new tokens]`` to time decoding along, from the documents of `text`; None for none.

    It is `text` itself if its sequences are long enough, else the same documents packed into longer ones.
    """
    if options.timed_on == "generated":
        return None
    length = options.prompt_tokens + options.new_tokens
    if text.tokens.shape[1] >= length:
        return text.tokens[:, :length]
    sequences = len(text.tokens) if text.parts else max(options.eval_tokens // length, 1)
    try:
        return _text(loaded, profile, names, options, length, sequences * length).tokens
    except FfnskipError as error:
        raise FfnskipError(
            f"The text has no {length} tokens in a row to time decoding along: lower --prompt-tokens or --new-tokens, "
            "name a longer --eval-dataset, or give --timed-on generated."
        ) from error


def _packed(model: PreTrainedModel, weights: Weights) -> tuple[PreTrainedModel, PreTrainedModel | None]:
    """The model to measure, and what it was packed from if it was: users compare with that."""
    if weights == "auto":
        return model, None
    with console.busy(f"Packing weights to {weights}"):
        pack_weights(packed := deepcopy(model), weights)
    return packed, model


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


def _warn_if_slower(rows: list[dict[str, Any]], timed_on: str) -> None:
    """Say so of a profile under whose speed-up nearly every pair of runs agrees that it loses time."""
    by_name = {row["name"]: row for row in rows}
    dense, ffnskip = by_name["dense"], by_name["ffnskip"]
    if ffnskip["speedup"] is None or ffnskip["speedup"] >= SLOWER:
        return
    ratios = pair_ratios(ffnskip["tokens_per_second"]["samples"], dense["tokens_per_second"]["samples"])
    if sum(ratio >= 1.0 for ratio in ratios) <= len(ratios) // 8:  # by chance alone once in 32 times, of five pairs
        where = "On this text" if timed_on == "text" else "On its own continuations"
        common.warn_of_slower_profile(where, f"speed-up {ffnskip['speedup']:.2f}")


def _warn_if_text_changed(profile: Profile, text: Corpus, options: Options) -> None:
    """Point out that a dataset has moved on since the profile was measured on it."""
    then = profile.evaluation
    if then is None or options.seed is not None or options.eval_dataset:
        return
    same_size = (then.tokens_requested, then.sequence_length) == (text.tokens_requested, text.tokens.shape[1])
    if not same_size:
        return
    hashes = [part.text_sha256 for part in text.parts] or [text.text_sha256]
    for old, sha256 in zip(then.parts or (then,), hashes, strict=True):
        if old.text_sha256 != sha256:
            console.warn(f"{old.dataset} holds other text now than when the profile was measured on it.")


def _text_names(options: Options, profile: Profile) -> list[str]:
    """The texts to measure on: by default those that the profile was measured on."""
    if options.eval_dataset:
        return options.eval_dataset
    if profile.evaluation is None:
        raise FfnskipError("The profile does not say what text it was measured on: name one with --eval-dataset.")
    return text_names(profile.evaluation)


def _parse_parts(measure: str) -> frozenset[str]:
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


def _print(document: dict[str, Any], format: Format) -> None:
    if format == "json":
        print_json(document)
        return
    rows = [
        row
        | {"tokens_per_second": (row["tokens_per_second"] or {}).get("median")}
        | {"kl_of_99": (row["kl_percentiles"] or {}).get("99")}
        for row in document["rows"]
    ]
    if format == "table":
        render(*turned(rows, _columns()))
    else:
        render(rows, _columns(), format)


def _print_breakdown(rows: list[dict[str, Any]], format: Format) -> None:
    timed = [{"name": row["name"]} | row["breakdown"] for row in rows if row["breakdown"]]
    if format == "json":  # it is in the document
        return
    if not timed:
        console.warn("Where the time goes is known of the fused path on a CPU alone, and when speed is measured.")
        return
    columns = [Column("name", "ms per token"), *(Column(part, part, ".2f") for part in timed[0] if part != "name")]
    render(timed, columns, format)


def _columns() -> list[Column]:
    return [
        Column("name", "row"),
        Column("skip_ratio", "skip ratio", ".3f"),
        Column("flops_per_token", "FLOPs/token", ".3g"),
        Column("flops_saved", "FLOPs saved", ".1%"),
        Column("flops_saved_past_warm_up", "past warm-up", ".1%"),
        Column("never_skip_fraction", "never skip", ".1%"),
        Column("tokens_per_second", "tokens/s", ".1f"),
        Column("decode_skip_ratio", "timed ratio", ".3f"),
        Column("speedup", "speed-up", ".2f"),
        Column("ceiling", "ceiling", ".2f"),
        Column("perplexity", "perplexity", ".2f"),
        Column("kl", "KL", ".3f"),
        Column("kl_of_99", "KL, 99 % of tokens", ".3f"),
        Column("top1_agreement", "top-1 agreement", ".3f"),
        Column("repetition", "repetition", ".3f"),
    ]
