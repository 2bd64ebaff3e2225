"""What a calibration announces before it runs: never less than it does, and no more than it has to leave open."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any
from unittest.mock import patch

import pytest
from support import calibrations
from support.calibrations import corpus_of, paper_settings
from support.pico import HIDDEN, N_LAYERS, VOCABULARY, pico_model, pico_tokens
from torch import Tensor, nn
from transformers import PreTrainedModel

from ffnskip.fast.fused_path import FusedPath
from ffnskip.model.sites import decoder_body
from ffnskip_cli.calibration.fit.auto import MOST_CANDIDATES, candidates
from ffnskip_cli.calibration.fit.normal import NormalEquations
from ffnskip_cli.calibration.forecast import memory_bytes, seconds
from ffnskip_cli.calibration.lab import Lab, Sizes, Step
from ffnskip_cli.calibration.pipeline import Pipeline
from ffnskip_cli.calibration.recording.file import Statistics
from ffnskip_cli.calibration.rules.cosine.compiler import CosineCompiler
from ffnskip_cli.calibration.settings import Goal, Settings
from ffnskip_cli.report.forecast import print_forecast

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

    def step(path: FusedPath, tokens: Tensor, ended: Tensor) -> Tensor:
        count.decode_steps += 1
        return fused_step(path, tokens, ended)

    fused_step = FusedPath.step
    hook = decoder_body(model_of()).register_forward_pre_hook(look, with_kwargs=True)
    try:
        with patch.object(FusedPath, "step", step):
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


def steps(settings: Settings, to_record: int, held_out: int = HELD_OUT) -> list[Step]:
    return Pipeline(settings).cost(Sizes.of(settings, to_record, held_out))


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
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else str(value),
)
def test_no_more_passes_run_than_were_announced(goals: tuple[Goal, ...], choices: dict[str, Any]) -> None:
    settings = settings_for(*goals, sequences=10, **choices)
    with counted(LENGTH) as count:
        solve(settings, recorded(settings))
    announced = steps(settings, 10, HELD_OUT)
    assert count.passes <= sum(step.passes for step in announced)
    assert count.decode_steps == sum(step.decode_steps for step in announced)


def test_the_same_holds_for_generated_text() -> None:
    settings = settings_for(RATIO, sequences=3, on="generated", warm_up=3, candidates=2)
    with counted(256) as count:
        solve(settings, recorded(settings))
    announced = steps(settings, 3, HELD_OUT)
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
    announced = sum(step.passes for step in steps(settings, 10, HELD_OUT)[1:-2])
    assert announced / 8 <= count.passes <= announced


@pytest.mark.parametrize(("on", "sequences"), [("text", 7), ("generated", 17)])
def test_what_the_recording_takes_is_announced_exactly(on: str, sequences: int) -> None:
    settings = settings_for(sequences=sequences, on=on)
    with counted(settings.sequence_length) as count:
        recorded(settings)
    (step,) = steps(settings, sequences, HELD_OUT)
    assert (count.passes, count.decode_steps) == (step.passes, step.decode_steps)


def test_a_plain_calibration_without_correction_rounds_is_announced_exactly() -> None:
    """The rest of what is announced for it are rounds of verification, of which one is enough here."""
    settings = settings_for(RATIO, sequences=10, warm_up=3, candidates=0)
    with counted(LENGTH) as count:
        solve(settings, recorded(settings))
    recording, verifying, quality = steps(settings, 10, HELD_OUT)
    most_rounds = verifying.passes // 10
    unused = count.passes - recording.passes - quality.passes
    assert unused in [10 * rounds for rounds in range(1, most_rounds + 1)]


def test_what_is_recorded_or_chosen_already_costs_nothing() -> None:
    assert [step.passes for step in steps(settings_for(sequences=10), 0, HELD_OUT)] == [0]
    chosen = settings_for(RATIO, sequences=10, warm_up=3, candidates=0)
    assert [step.name for step in steps(chosen, 0, HELD_OUT)] == [
        "record similarities",
        "solve and verify",
        "measure quality",
    ]


def test_long_texts_are_compared_on_in_part_only() -> None:
    short, long = (
        {step.name: step for step in steps(settings_for(KL, sequences=sequences), sequences, HELD_OUT)}
        for sequences in (1_000, 100_000)
    )
    assert list(short) == list(long)
    different = [name for name in short if short[name] != long[name]]
    assert different == ["record similarities"]


def test_times_are_the_number_of_passes_by_the_time_of_one() -> None:
    tokens = pico_tokens(LENGTH, batch=10)
    planned = [Step("one", 1), Step("ten", 10), Step("decode", 0, 1), Step("all", 2, 3), Step("none", 0)]
    one, ten, decode, both, none = seconds(model_of(), tokens, planned)
    assert min(one, decode) > 0
    assert (ten, none) == (pytest.approx(10 * one), 0)
    assert both == pytest.approx(2 * one + 3 * decode)


def test_timing_runs_a_few_passes_only_and_decodes_only_where_it_must() -> None:
    with counted(LENGTH) as count:
        seconds(model_of(), pico_tokens(LENGTH, batch=40), [Step("one", 1000)])
    assert (count.passes <= 5, count.decode_steps) == (True, 0)
    with counted(LENGTH) as count:
        seconds(model_of(), pico_tokens(LENGTH, batch=40), [Step("one", 0, 1000)])
    assert 0 < count.decode_steps <= 5


@pytest.mark.parametrize("sequence_length", [2, 3])
def test_the_shortest_sequences_can_be_timed(sequence_length: int) -> None:
    assert seconds(model_of(), pico_tokens(sequence_length), [Step("one", 1, 1)])[0] > 0


@pytest.mark.parametrize("on", ["text", "generated"])
def test_memory_is_the_weights_the_recording_and_logits(on: str) -> None:
    settings = settings_for(sequences=3, on=on)
    needs = memory_bytes(model_of(), settings)
    record = recorded(settings).record
    assert needs["weights"] == sum(weight.nbytes for weight in model_of().parameters())
    assert needs["recording"] == 2 * (record.sequences.nbytes + record.values.nbytes)  # a copy while it is saved
    assert needs["logits"] >= 3 * settings.sequence_length * VOCABULARY * 4
    assert record.values.shape[2] == N_LAYERS


def test_what_a_fit_takes_is_announced_as_its_passes() -> None:
    """20 sequences, half of which have gradients; ten others that the fits are measured on."""
    settings = settings_for(RATIO, sequences=10, **DAMAGE, compensate="low-rank", warm_up=3)
    announced = {step.name: step.passes for step in steps(settings, 0, HELD_OUT)}
    fitting = {
        "take gradients": 3 * 10,
        "choose neurons": 16,
        "fit to the dense model": 7 + 2,
        "refit up to 4 times": 4 * 7,
        "measure the fits": 5 * 4 * 10,
        "record predicted damages": 10,
    }
    assert list(announced)[1:-2] == list(fitting)
    assert announced.items() >= fitting.items()


def test_the_compensations_that_are_compared_are_no_more_than_announced() -> None:
    assert len(candidates(model_of())) <= MOST_CANDIDATES


@pytest.mark.parametrize(
    ("choices", "features"),
    [
        ({"compensate": "low-rank", "rank": 3, "neurons": 8}, HIDDEN + 8 + 1),
        ({"compensate": "linear", "neurons": 0}, HIDDEN + 1),
        ({"compensate": "mean"}, 1),
    ],
)
def test_the_sums_of_a_fit_take_memory_for_every_layer_of_the_region(
    choices: dict[str, Any], features: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pins = {"cold_s": 1, "cold_e": 5, "warm_up": 3}
    settings = settings_for(RATIO, sequences=10, **DAMAGE, **choices, **pins)
    made: list[NormalEquations] = []
    start = NormalEquations.__init__

    def keep(sums: NormalEquations, *sizes: int) -> None:
        start(sums, *sizes)
        made.append(sums)

    monkeypatch.setattr(NormalEquations, "__init__", keep)
    solve(settings, recorded(settings))
    largest = [sums for sums in made if sums.gram.shape == (4, features, features) and sums.cross.shape[2] == HIDDEN]
    assert len(largest) >= 3  # to fit, to choose the ridge, and of a refit
    sizes = {sums.gram.nbytes + sums.cross.nbytes for sums in largest}
    assert sizes == {4 * 8 * features * (features + HIDDEN)}
    fisher = N_LAYERS * HIDDEN**2 * 4
    whole = memory_bytes(model_of(), settings)["fit"]
    assert whole >= 2 * sizes.pop() + fisher
    smaller = memory_bytes(model_of(), settings_for(RATIO, sequences=10, **DAMAGE, **choices, **pins | {"cold_e": 3}))
    assert smaller["fit"] < whole or choices == {"compensate": "mean"}  # of which the gradients are the largest part


def test_without_a_fit_none_is_announced() -> None:
    assert "fit" not in memory_bytes(model_of(), settings_for(RATIO, sequences=3))
    assert "fit" not in memory_bytes(model_of(), settings_for(sequences=3, **DAMAGE))  # only records


def test_the_table_ends_with_the_sums(capsys: pytest.CaptureFixture[str]) -> None:
    planned = [Step("record", 100), Step("try", 20, 7)]
    print_forecast(planned, [60.0, 90.0], {"weights": 3 * 2**20}, 10, "csv")
    rows = [line.split(",") for line in capsys.readouterr().out.splitlines()]
    assert [row[0] for row in rows[1:]] == ["record", "try", "all"]
    assert [float(number) for number in rows[3][1:]] == [120, 1200, 7, 2.5]
    print_forecast(planned, [60.0, 90.0], {"weights": 3 * 2**20}, 10, "md")
    assert "weights 3 MiB" in capsys.readouterr().out


def test_json_has_the_steps_and_the_memory(capsys: pytest.CaptureFixture[str]) -> None:
    print_forecast([Step("record", 100)], [30.0], {"weights": 5}, 10, "json")
    document = json.loads(capsys.readouterr().out)
    row = {"step": "record", "passes": 100, "tokens": 1000, "decode_steps": 0, "minutes": 0.5}
    assert document == {"schema": "ffnskip-forecast/v1", "steps": [row], "memory_bytes": {"weights": 5}}
