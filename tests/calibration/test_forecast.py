"""What a calibration announces before it runs: never less than it does, and no more than it has to leave open."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
from support import calibrations
from support.calibrations import corpus_of, paper_settings
from support.pico import HIDDEN, N_LAYERS, VOCABULARY, pico_model, pico_tokens
from torch import Tensor, nn
from transformers import PreTrainedModel

from ffnskip.model.sites import decoder_body
from ffnskip_cli.calibration.fit.least_squares import NormalEquations
from ffnskip_cli.calibration.fit.stage import MOST_CANDIDATES, candidates
from ffnskip_cli.calibration.lab import Lab, Sizes, Step
from ffnskip_cli.calibration.pipeline import Pipeline
from ffnskip_cli.calibration.recording.file import Statistics
from ffnskip_cli.calibration.rules.cosine.compiler import CosineCompiler
from ffnskip_cli.calibration.settings import Goal, Settings
from ffnskip_cli.report.calibration import print_forecast

LENGTH, HELD_OUT = 44, 5  # warm-ups of 0, 5 and 10 are possible in sequences of 44
SELF_CHECK = 8  # tokens of the passes that prove that a profile works; too short to announce
RATIO, KL = Goal("target_ratio", 0.2), Goal("max_kl", 0.05)
FIT = 20 * LENGTH
DAMAGE: dict[str, Any] = {"rule": "predicted-damage", "fit_tokens": FIT}


@cache
def model_of() -> PreTrainedModel:
    return pico_model(max_position_embeddings=256)


@dataclass
class Count:
    """Forward passes over one whole sequence, and those that generate a token for each of some."""

    passes: int = 0
    decode_steps: int = 0


@contextmanager
def counted(length: int) -> Iterator[Count]:
    count = Count()

    def look(body: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        tokens = args[0] if args else kwargs.get("input_ids")
        if tokens is None:  # whoever embeds by himself goes backward, too, which costs as much as two more
            count.passes += 3
        elif tokens.shape[1] == length:
            count.passes += len(tokens)
        elif tuple(tokens.shape) != (1, SELF_CHECK):
            count.decode_steps += 1

    hook = decoder_body(model_of()).register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield count
    finally:
        hook.remove()


def settings_for(*goals: Goal, sequences: int, **choices: Any) -> Settings:
    length = 256 if choices.get("on") == "generated" else LENGTH
    return paper_settings(*goals, **{"tokens": sequences * length, "sequence_length": length, **choices})


def recorded(settings: Settings) -> Statistics:
    text = pico_tokens(settings.sequence_length, batch=settings.tokens // settings.sequence_length)
    return calibrations.recorded(model_of(), text, settings)


def solve(settings: Settings, statistics: Statistics) -> None:
    held_out = pico_tokens(settings.sequence_length, batch=HELD_OUT, seed=1)
    text = pico_tokens(settings.sequence_length, batch=settings.fit_tokens // settings.sequence_length, seed=2)
    to_fit = corpus_of(text) if settings.fits else None
    Pipeline(settings).compile(Lab(model_of()), statistics, corpus_of(held_out, "other"), to_fit)


def steps(settings: Settings, to_record: int) -> list[Step]:
    return Pipeline(settings).cost(Sizes.of(settings, to_record, HELD_OUT))


@pytest.mark.parametrize(
    ("goals", "choices"),
    [
        ((RATIO,), {"warm_up": 3, "candidates": 0}),
        ((RATIO,), {"candidates": 0}),  # only the warm-up is chosen
        ((Goal("target_ratio", 0.05), RATIO), {"warm_up": 3, "candidates": 6}),
        ((Goal("target_ratio", 0.05), RATIO), {"candidates": 1}),
        ((KL,), {"candidates": 0}),
        ((Goal("max_kl", 0.01), KL, Goal("max_kl", 50.0)), {"warm_up": 3, "candidates": 4}),
        ((Goal("max_perplexity_increase", 0.001), Goal("max_perplexity_increase", 0.02)), {"candidates": 2}),
        ((Goal("max_kl", 1e-9),), {"warm_up": 3, "candidates": 0}),  # is refused
        ((RATIO,), {"compensate": "linear", "neurons": 0, "candidates": 2, "fit_tokens": FIT}),
        ((RATIO,), {**DAMAGE, "compensate": "low-rank"}),
        ((RATIO,), {**DAMAGE, "compensate": "auto", "warm_up": 3}),
        ((Goal("max_kl", 0.01), KL), {**DAMAGE, "compensate": "mean", "warm_up": 3}),
        ((RATIO,), {"on": "generated", "warm_up": 3, "candidates": 2}),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else str(value),
)
def test_no_more_passes_run_than_were_announced(goals: tuple[Goal, ...], choices: dict[str, Any]) -> None:
    sequences = 3 if "on" in choices else 6
    settings = settings_for(*goals, sequences=sequences, **choices)
    with counted(settings.sequence_length) as count:
        solve(settings, recorded(settings))
    announced = steps(settings, sequences)
    assert 0 < count.passes <= sum(step.passes for step in announced)
    assert count.decode_steps == sum(step.decode_steps for step in announced)


@pytest.mark.parametrize(
    ("goals", "choices"),
    [
        ((RATIO,), {"candidates": 0}),
        ((RATIO,), {"candidates": 1, "warm_up": 3}),
        ((RATIO,), {"candidates": 5}),
        ((Goal("max_kl", 0.01), KL), {"candidates": 0}),
        ((Goal("max_kl", 0.01), KL), {"candidates": 4}),
        ((RATIO,), {"candidates": 0, "warm_up": 3}),
    ],
)
def test_the_same_holds_for_the_choice_of_the_rule_alone(goals: tuple[Goal, ...], choices: dict[str, Any]) -> None:
    settings = settings_for(*goals, sequences=10, **choices)
    statistics = recorded(settings)
    with counted(LENGTH) as count:
        CosineCompiler(settings).choose(Lab(model_of()), statistics)
    announced = sum(step.passes for step in steps(settings, 10)[1:-2])
    assert announced / 8 <= count.passes <= announced


@pytest.mark.parametrize(("on", "sequences"), [("text", 7), ("generated", 17)])
def test_a_recording_is_announced_exactly_and_what_is_recorded_costs_nothing(on: str, sequences: int) -> None:
    settings = settings_for(sequences=sequences, on=on)
    with counted(settings.sequence_length) as count:
        recorded(settings)
    (step,) = steps(settings, sequences)
    assert (count.passes, count.decode_steps) == (step.passes, step.decode_steps)
    assert [step.passes for step in steps(settings, 0)] == [0]


def test_a_plain_calibration_without_correction_rounds_is_announced_exactly() -> None:
    """The rest of what is announced for it are rounds of verification, of which one is enough here."""
    settings = settings_for(RATIO, sequences=10, warm_up=3, candidates=0)
    with counted(LENGTH) as count:
        solve(settings, recorded(settings))
    recording, verifying, quality = steps(settings, 10)
    most_rounds = verifying.passes // 10
    unused = count.passes - recording.passes - quality.passes
    assert unused in [10 * rounds for rounds in range(1, most_rounds + 1)]


def test_long_texts_are_compared_on_in_part_only() -> None:
    short, long = (steps(settings_for(KL, sequences=sequences), sequences) for sequences in (1_000, 100_000))
    assert len(short) > 1
    assert short[1:] == long[1:]  # all but the recording


def test_times_are_the_number_of_passes_by_the_time_of_one_and_take_only_a_few_passes() -> None:
    for length in (2, 3, LENGTH):
        tokens = pico_tokens(length, batch=40)
        planned = [Step("one", 1), Step("ten", 10), Step("decode", 0, 1), Step("all", 2, 3), Step("none", 0)]
        with counted(length) as count:
            one, ten, decode, both, none = Lab(model_of()).seconds(tokens, planned)
        assert min(one, decode) > 0
        assert (ten, none) == (pytest.approx(10 * one), 0)
        assert both == pytest.approx(2 * one + 3 * decode)
    assert count.passes <= 5
    assert 0 < count.decode_steps <= 5
    with counted(LENGTH) as count:
        Lab(model_of()).seconds(tokens, [Step("one", 1000)])
    assert count.decode_steps == 0


@pytest.mark.parametrize("on", ["text", "generated"])
def test_memory_is_the_weights_the_recording_and_logits_and_nothing_for_a_fit(on: str) -> None:
    settings = settings_for(sequences=3, on=on)
    needs = Pipeline(settings).memory(model_of())
    record = recorded(settings).record
    assert needs["weights"] == sum(weight.nbytes for weight in model_of().parameters())
    assert needs["recording"] == 2 * (record.sequences.nbytes + record.values.nbytes)  # a copy while it is saved
    assert needs["logits"] >= 3 * settings.sequence_length * VOCABULARY * 4
    assert "fit" not in needs
    assert "fit" not in Pipeline(settings_for(sequences=3, **DAMAGE)).memory(model_of())  # only records


def test_what_a_fit_takes_is_announced_as_its_passes() -> None:
    """20 sequences, half of which have gradients; ten others that the fits are measured on."""
    settings = settings_for(RATIO, sequences=10, **DAMAGE, compensate="low-rank", warm_up=3)
    fitting = [3 * 10, 16, 7 + 2, 4 * 7, 5 * 4 * 10, 10]
    assert [step.passes for step in steps(settings, 0)][1:-2] == fitting
    assert len(candidates(model_of())) <= MOST_CANDIDATES  # for which `auto` announces passes


@pytest.mark.parametrize(
    ("choices", "features"),
    [
        ({"compensate": "low-rank", "rank": 3, "neurons": 8}, HIDDEN + 8 + 1),
        ({"compensate": "linear", "neurons": 0}, HIDDEN + 1),
        ({"compensate": "mean"}, 1),
    ],
)
def test_a_fit_takes_memory_for_fisher_matrices_and_sums_of_every_layer(choices: dict[str, Any], features: int) -> None:
    pins = {"cold_s": 1, "cold_e": 5, "warm_up": 3}
    settings = settings_for(RATIO, sequences=10, **DAMAGE, **choices, **pins)
    sums = NormalEquations(4, features, HIDDEN)
    fisher = N_LAYERS * HIDDEN**2 * 4
    whole = Pipeline(settings).memory(model_of())["fit"]
    assert whole >= 2 * (sums.gram.nbytes + sums.cross.nbytes) + fisher
    fewer_layers = settings_for(RATIO, sequences=10, **DAMAGE, **choices, **pins | {"cold_e": 3})
    smaller = Pipeline(fewer_layers).memory(model_of())
    assert smaller["fit"] < whole or choices == {"compensate": "mean"}  # of which the gradients are the largest part


def test_the_table_and_json_have_the_steps_their_sums_and_the_memory(capsys: pytest.CaptureFixture[str]) -> None:
    planned, needs = [Step("record", 100), Step("try", 20, 7)], {"weights": 3 * 2**20}

    def shown(format: Any) -> str:
        print_forecast(planned, [60.0, 90.0], needs, 10, format)
        return capsys.readouterr().out

    rows = [line.split(",") for line in shown("csv").splitlines()]
    assert [row[0] for row in rows[1:]] == ["record", "try", "all"]
    assert [float(number) for number in rows[3][1:]] == [120, 1200, 7, 2.5]
    assert "weights 3 MiB" in shown("md")
    document = json.loads(shown("json"))
    row = {"step": "record", "passes": 100, "tokens": 1000, "decode_steps": 0, "minutes": 1.0}
    assert (document["schema"], document["steps"][0]) == ("ffnskip-forecast/v1", row)
    assert (len(document["steps"]), document["memory_bytes"]) == (2, needs)
