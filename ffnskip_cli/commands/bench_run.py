"""What `ffnskip bench` does."""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING, Any

from ffnskip.decoder import Decoder
from ffnskip.errors import FfnskipError
from ffnskip.model.packed import pack_weights
from ffnskip.profiles.profile import Profile
from ffnskip_cli import console
from ffnskip_cli.bench.suite import PARTS, Plan, run_suite
from ffnskip_cli.bench.tables import sweep, warm_ups, worst_case
from ffnskip_cli.calibration.lab import Lab
from ffnskip_cli.commands import common, loading
from ffnskip_cli.commands.bench import Options
from ffnskip_cli.commands.options import Weights
from ffnskip_cli.measure.speed import pair_ratios
from ffnskip_cli.opponents import OPPONENTS
from ffnskip_cli.report.bench import page, print_bench, print_breakdown
from ffnskip_cli.report.plot import refuse_without_matplotlib
from ffnskip_cli.report.tables import print_json
from ffnskip_cli.sources.models import LoadedModel
from ffnskip_cli.text.corpus import Corpus
from ffnskip_cli.text.named import check_names, dataset_names, evaluation_text, text_names

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

SLOWER = 0.98  # of the dense speed; the two per cent above it are what a profile may cost that skips nothing
NOISY = 0.25  # of the median; beyond it a difference of a few per cent between rows cannot be seen


def run(options: Options) -> None:
    """Measure the profile in one process and print a row for each way to run the model, or the tables asked for."""
    plan = _plan(options)
    if common.is_page(options.output):
        refuse_without_matplotlib()
    offline = options.model_options.offline
    loaded, profile, profile_name = loading.load_pair(
        options.model,
        options.profile,
        options.move,
        options.model_options,
        other_weights=options.other_weights,
        refuse=lambda profile: check_names(_text_names(options, profile), offline),
    )
    names = _text_names(options, profile)
    model, original = _packed(loaded.model, options.model_options.weights)
    decoder = Decoder(model, profile, other_weights=True)  # checks path and profile before the long part
    common.say_path(decoder)
    length = _sequence_length(profile, options.prompt_tokens)
    longest = max(length, options.prompt_tokens + max(_decoded(options, plan), default=0))
    common.refuse_longer(loaded.model, longest, "lower the numbers of tokens")
    text = _text(loaded, profile, names, options, length, options.eval_tokens)
    if not options.savings:
        common.say_expected_cost(profile, options.move)
    _warn_if_text_changed(profile, text, options)
    has_speed = "speed" in plan.parts and (options.savings or not options.has_tables)
    timed_text = _timed_text(loaded, profile, names, options, text) if has_speed else None
    document = _head(options, loaded, profile_name, profile, decoder, names, text)
    lab, tokens = Lab(model, console.track), text.tokens
    if options.savings:
        document["sweep"] = []
        for point in sweep(lab, profile, tokens, options.savings, plan, timed_text=timed_text, original=original):
            document["sweep"].append(point)
            _write(document, options)  # a kill costs the point at work alone
    if options.lengths:
        prompts = tokens[: options.prompts, : options.prompt_tokens]
        document["worst_case"] = worst_case(lab, profile, tokens, prompts, options.lengths)
    if options.warm_ups:
        document["warm_up"] = warm_ups(lab, profile, tokens, options.warm_ups)
    if not options.has_tables:
        document["rows"] = run_suite(
            model, decoder, tokens, plan, console.track, timed_text=timed_text, original=original
        )
    _finish(document, options)


def _finish(document: dict[str, Any], options: Options) -> None:
    """Write, print and warn."""
    _write(document, options)
    rows = document.get("rows", [row for point in document.get("sweep", []) for row in point["rows"]])
    if options.format == "json":
        print_json(document)
    else:
        print_bench(document, options.format)
        if options.breakdown and not print_breakdown(rows, options.format):
            console.warn("Where the time goes is known of the fused path on a CPU alone, and when speed is measured.")
    _warn_if_noisy(rows)
    if "rows" in document:
        _warn_if_slower(rows, options.timed_on)


def _write(document: dict[str, Any], options: Options) -> None:
    if options.output is not None:
        common.write_result(document, options.output, lambda: page(document))


def _plan(options: Options) -> Plan:
    usual = "quality,speed" if options.savings else ",".join(part for part in PARTS if part != "layers")
    parts = frozenset(part.strip() for part in (usual if options.measure is None else options.measure).split(","))
    if unknown := parts - set(PARTS):
        raise FfnskipError(f"--measure cannot measure {sorted(unknown)[0]!r}: choose from {', '.join(PARTS)}.")
    if (alone := parts & {"opponents", "layers"}) and "quality" not in parts:
        raise FfnskipError(f"--measure {sorted(alone)[0]} needs the part quality as well, to be held against it.")
    if options.opponents != "all" and "opponents" not in parts:
        raise FfnskipError("--opponents needs the part opponents in --measure.")
    given = tuple(name.strip() for name in options.opponents.split(","))
    given = tuple(OPPONENTS) if given == ("all",) else given
    if strangers := [name for name in given if name not in OPPONENTS]:
        raise FfnskipError(f"--opponents has no {strangers[0]!r}: choose from {', '.join(OPPONENTS)}.")
    return Plan(parts, options.prompt_tokens, options.new_tokens, options.repetitions, options.prompts, given)


def _decoded(options: Options, plan: Plan) -> list[int]:
    """How many tokens decodes will have behind their prompts."""
    decodes = bool(plan.parts & {"speed", "worst-case"}) and (bool(options.savings) or not options.has_tables)
    return [*options.lengths, *([options.new_tokens] if decodes else [])]


def _head(
    options: Options,
    loaded: LoadedModel,
    profile_name: str,
    profile: Profile,
    decoder: Decoder,
    names: list[str],
    text: Corpus,
) -> dict[str, Any]:
    """What the figures of a document are figures of."""
    return {
        "schema": "ffnskip-bench/v1",
        "model": loaded.id,
        "profile": profile_name,
        "threshold": profile.skip.threshold,
        "device": loaded.placement,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "weights": options.model_options.weights,
        "path": decoder.path,
        "eval_dataset": " + ".join(names),
        "eval_tokens": text.tokens_used,
        "prompt_tokens": options.prompt_tokens,
        "new_tokens": options.new_tokens,
        # Nothing follows the last one.
        "new_tokens_past_warm_up": max(options.new_tokens - 1 - profile.skip.warm_up, 0),
        "timed_on": options.timed_on,
        "prompts": min(options.prompts, len(text.tokens)),
        "repetitions": options.repetitions,
    }


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


def _sequence_length(profile: Profile, prompt_tokens: int) -> int:
    """That of the profile's own measurement, if a prompt fits into it."""
    measured = profile.evaluation.sequence_length if profile.evaluation else 256
    return max(measured, prompt_tokens)
