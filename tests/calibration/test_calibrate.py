"""The whole calibration on a pico model: the profile says what is true, and nothing about where it was made."""

import json
import math
import random
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from support import calibrations
from support.calibrations import paper_settings
from support.naive import naive_forward
from support.pico import HIDDEN, N_LAYERS, pico_model, pico_tokens
from torch import Tensor
from transformers import PreTrainedModel

import ffnskip
from ffnskip import FfnskipError, Profile, SkipStats
from ffnskip.decode import GeneralPath, generate_tokens
from ffnskip.model.sites import ffn_sites
from ffnskip.profiles.profile import dump_profile, parse_profile
from ffnskip_cli.calibration.assemble import Calibrated, Calibration, verdict
from ffnskip_cli.calibration.lab import Lab
from ffnskip_cli.calibration.pipeline import Pipeline
from ffnskip_cli.calibration.recording.collect import Share, collect, identity_of, source_of
from ffnskip_cli.calibration.recording.ranks import Ranks
from ffnskip_cli.calibration.recording.record import record_text
from ffnskip_cli.calibration.settings import GENERATED_TOKENS, PROMPT_TOKENS, Goal
from ffnskip_cli.calibration.texts import held_out_of, text_to_record
from ffnskip_cli.calibration.threshold.verify import Verified, verify
from ffnskip_cli.measure.flops import model_cost
from ffnskip_cli.measure.quality import Estimate, Quality
from ffnskip_cli.sources.models import load_model

LENGTH, WARM_UP = 24, 3
TEXT, HELD_OUT = pico_tokens(LENGTH, batch=12), pico_tokens(LENGTH, batch=4, seed=1)
TARGETS = (0.1, 0.2)


@cache
def model_of(ffn_scale: float = 1.0) -> PreTrainedModel:
    """In float64, so that no similarity lies within rounding of a threshold."""
    model = pico_model(dtype=torch.float64)
    with torch.no_grad():
        for site in ffn_sites(model):
            for weight in site.layer.get_submodule("mlp").parameters():
                weight *= ffn_scale
    return model


def all_finished(calibration: Calibration) -> list[Calibrated]:
    if calibration.refused:
        raise FfnskipError(calibration.refused[0])
    return calibration.finished


def run(
    goals: tuple[float | Goal, ...] = TARGETS,
    text: Tensor = TEXT,
    held_out: Tensor = HELD_OUT,
    model: PreTrainedModel | None = None,
    **settings: Any,
) -> list[Calibrated]:
    model = model_of() if model is None else model
    chosen = paper_settings(
        *(goal if isinstance(goal, Goal) else Goal("target_ratio", goal) for goal in goals),
        **{"tokens": text.numel(), "sequence_length": text.shape[1], "warm_up": WARM_UP, "candidates": 0, **settings},
    )
    return all_finished(calibrations.calibrated(model, text, held_out, chosen))


@cache
def calibrated() -> list[Calibrated]:
    return run()


def ratio_by_apply(profile: Profile, sequences: Tensor) -> float:
    stats = SkipStats(N_LAYERS)
    for sequence in sequences:
        with ffnskip.apply(model_of(), profile, mode="score") as applied, torch.inference_mode():
            model_of()(sequence[None])
        stats.add(applied.stats)
    return stats.skip_ratio


def test_each_target_is_what_the_running_model_skips_on_the_calibration_text() -> None:
    for target, found in zip(TARGETS, calibrated(), strict=True):
        ratio = ratio_by_apply(found.profile, TEXT)
        assert ratio == pytest.approx(target, abs=0.01)
        assert found.calibration_ratio == ratio


def test_every_measured_figure_is_what_a_naive_run_gives() -> None:
    for found in calibrated():
        figures = found.profile.measured
        assert figures is not None
        expected = naive_measurements(found.profile.skip)
        actual = {name: getattr(figures, name) for name in expected}
        assert actual == pytest.approx(expected, rel=6e-5)  # written with five digits
        assert figures.tokens == 4 * (LENGTH - 1 - WARM_UP)
        assert figures.within_budget == (figures.kl <= 0.25 and figures.top1_agreement >= 0.8)


def naive_measurements(skip: Any) -> dict[str, float]:
    """Token by token, in float64 and natural logarithms, on whole logits."""
    model, per_sequence = model_of(), LENGTH - 1 - WARM_UP
    nll_dense = nll = kl = agree = 0.0
    skipped = compared = never = 0
    for sequence in HELD_OUT:
        with torch.inference_mode():
            dense = model(sequence[None]).logits[0].softmax(-1)[WARM_UP:-1]
        naive = naive_forward(model, sequence, skip)
        sparse, targets = naive.logits.softmax(-1)[WARM_UP:-1], sequence[WARM_UP + 1 :]
        rows = torch.arange(per_sequence)
        nll_dense -= float(dense[rows, targets].log().sum())
        nll -= float(sparse[rows, targets].log().sum())
        kl += float((dense * (dense / sparse).log()).sum())
        agree += float((dense.argmax(-1) == sparse.argmax(-1)).sum())
        for token in naive.tokens[WARM_UP:]:
            skipped += sum(token.skipped)
            never += not any(token.skipped)
            compared += sum(layer < skip.cold_e - 1 for layer in token.compared)
    tokens, past = 4 * per_sequence, 4 * (LENGTH - WARM_UP)
    saved = skipped * 2 * 3 * HIDDEN * 48 - compared * 7 * HIDDEN
    return {
        "skip_ratio": skipped / (N_LAYERS * past),
        "flops_saved": saved / (4 * model_cost(model).dense_flops(0, LENGTH)),
        "never_skip_fraction": never / past,
        "perplexity_dense": math.exp(nll_dense / tokens),
        "perplexity": math.exp(nll / tokens),
        "kl": kl / tokens,
        "top1_agreement": agree / tokens,
    }


def test_the_profile_tells_both_texts_apart_and_what_was_asked_for() -> None:
    profile = run((0.1,), window=2, refresh_every=4, seed=5)[0].profile
    assert profile.calibration is not None
    assert profile.evaluation is not None
    assert profile.measured is not None
    assert (profile.calibration.dataset, profile.evaluation.dataset) == ("own", "other")
    assert (profile.calibration.tokens_requested, profile.calibration.tokens_used) == (TEXT.numel() + 7, TEXT.numel())
    assert (profile.evaluation.tokens_used, profile.evaluation.sequence_length) == (HELD_OUT.numel(), LENGTH)
    assert (profile.calibration.seed, profile.calibration.dtype, profile.calibration.on) == (5, "float64", "text")
    assert (profile.skip.warm_up, profile.skip.window, profile.skip.refresh_every) == (WARM_UP, 2, 4)
    assert profile.measured.target_ratio == 0.1
    assert parse_profile(dump_profile(profile)) == profile


def test_the_curve_is_one_for_all_targets_and_goes_through_every_profile() -> None:
    first, second = (found.profile for found in calibrated())
    assert first.curve == second.curve
    ratios = [point.skip_ratio for point in first.curve]
    assert ratios == sorted(ratios)
    assert len(ratios) >= 8
    for profile in (first, second):
        assert profile.measured is not None
        point = (profile.skip.threshold, profile.measured.skip_ratio, profile.measured.kl)
        assert point in first.curve


def test_the_similarity_curve_is_that_of_the_tokens_past_warm_up() -> None:
    curve = calibrated()[0].profile.similarity
    assert curve is not None
    past = record_text(model_of(), TEXT).values[:, WARM_UP:].flatten(0, 1)
    ordered = past.sort(dim=0).values
    tenth, last_tenth = ordered[len(past) // 10], ordered[-len(past) // 10]
    assert curve.mean == pytest.approx(past.mean(dim=0).tolist(), rel=2e-5)
    assert curve.low == pytest.approx(tenth.tolist(), abs=0.01)
    assert curve.high == pytest.approx(last_tenth.tolist(), abs=0.01)


def test_twice_the_same_run_gives_the_same_bytes_and_another_text_others() -> None:
    again = [dump_profile(found.profile) for found in run()]
    assert again == [dump_profile(found.profile) for found in calibrated()]
    other_text = run(text=pico_tokens(LENGTH, batch=12, seed=2))
    assert other_text[0].profile.skip.threshold != calibrated()[0].profile.skip.threshold
    assert other_text[0].profile.similarity != calibrated()[0].profile.similarity


def test_the_region_can_be_pinned_on_either_side() -> None:
    proposed = calibrated()[0].profile.skip
    assert (proposed.cold_s, proposed.cold_e) == (2, 5)
    for pins, region in {(1, None): (1, 5), (None, 6): (2, 6), (0, 4): (0, 4)}.items():
        skip = run((0.1,), cold_s=pins[0], cold_e=pins[1])[0].profile.skip
        assert (skip.cold_s, skip.cold_e) == region


@pytest.mark.parametrize(("cold_s", "cold_e"), [(4, 4), (5, 3), (0, N_LAYERS + 1), (N_LAYERS, None)])
def test_pins_that_are_no_region_are_refused_in_one_sentence(cold_s: int | None, cold_e: int | None) -> None:
    with pytest.raises(FfnskipError, match=r"^The skip region [^\n]+ within the model's 6 layers\.$"):
        run(cold_s=cold_s, cold_e=cold_e)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"goals": (0.9,)}, r"0\.9 cannot be reached: layers 0 to 5 allow at most 0\.833"),
        ({"held_out": HELD_OUT[:1]}, "at least two sequences of text"),
        ({"goals": (0.1, 1.0)}, "The target 1 is not a ratio between 0 and 1"),
        ({"warm_up": LENGTH - 1}, "--warm-up must be at most 22"),
        ({"on": "generated"}, "--sequence-length is 256"),
        ({"model": pico_model("opt")}, "no feed-forward module per layer"),
    ],
)
def test_what_cannot_be_calibrated_is_refused_in_one_sentence(options: dict[str, Any], message: str) -> None:
    with pytest.raises(FfnskipError, match=rf"^[^\n]*{message}[^\n]*\.$"):
        run(**options)


def test_a_model_that_overflows_is_refused_in_one_sentence() -> None:
    model = pico_model(dtype=torch.float16)
    with torch.no_grad():
        ffn_sites(model)[3].layer.get_submodule("mlp.down_proj").weight *= 60_000
    with pytest.raises(FfnskipError, match=r"^[^\n]+ activations are not finite numbers: try another --dtype[^\n]+\.$"):
        run(model=model)


@pytest.mark.parametrize(("ffn_scale", "within"), [(0.5, True), (1.5, False)])
def test_the_verdict_follows_the_damage(ffn_scale: float, within: bool) -> None:
    measured = run((0.2,), model=model_of(ffn_scale), cold_s=1, cold_e=5)[0].profile.measured
    assert measured is not None
    assert measured.within_budget == within
    assert measured.verdict.startswith("within the quality budget" if within else "over the quality budget")


@pytest.mark.parametrize(
    ("kl", "agreement", "broken"),
    [(0.25, 0.80, []), (0.26, 0.80, ["KL 0.26"]), (0.1, 0.7, ["top-1 agreement 0.70"]), (9, 0, ["KL 9.00", "0.00"])],
)
def test_the_verdict_names_what_is_over_budget(kl: float, agreement: float, broken: list[str]) -> None:
    zero = Estimate(0.0, 0.0)
    quality = Quality(2, 2, zero, zero, Estimate(kl, 0.0), Estimate(agreement, 0.0), zero, SkipStats(N_LAYERS), ())
    within, sentence = verdict(quality)
    assert within == (not broken)
    assert all(words in sentence for words in broken)
    assert ("KL" in sentence, "top-1" in sentence) == (kl > 0.25 or within, agreement < 0.8 or within)


def test_calibrating_on_generated_tokens_counts_none_of_the_prompts() -> None:
    length = PROMPT_TOKENS + GENERATED_TOKENS
    prompts = pico_tokens(length, batch=3)
    (found,) = run((0.15,), text=prompts, held_out=pico_tokens(length, batch=2, seed=1), on="generated")
    profile = found.profile
    assert profile.calibration is not None
    assert profile.calibration.on == "generated"
    assert found.calibration_ratio == pytest.approx(0.15, abs=0.01)

    sequences = prompts[:, :PROMPT_TOKENS]
    generated = torch.stack(
        list(generate_tokens(GeneralPath(model_of()), sequences, max_new_tokens=GENERATED_TOKENS)), dim=1
    )
    behind_prompts = profile.skip.model_copy(update={"warm_up": PROMPT_TOKENS + WARM_UP})
    whole = torch.cat([sequences, generated], dim=1)
    assert found.calibration_ratio == ratio_by_apply(profile.model_copy(update={"skip": behind_prompts}), whole)

    (other_continuations,) = run((0.15,), text=prompts, held_out=pico_tokens(length, batch=2, seed=1))
    assert other_continuations.profile.skip.threshold != profile.skip.threshold


def calibrated_in(folder: Path, pico_folder: Path, seed: int = 0) -> str:
    """The dump of a profile of a model and a text that lie in `folder`."""
    shutil.copytree(pico_folder, folder / "pico", dirs_exist_ok=True)
    words = random.Random(0)
    rows = [{"text": "".join(words.choices("abcdefgh ", k=60))} for _ in range(80)]
    (folder / "text.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    loaded = load_model(str(folder / "pico"))
    settings = paper_settings(
        Goal("target_ratio", 0.2),
        tokens=640,
        eval_tokens=256,
        sequence_length=32,
        warm_up=2,
        cold_s=0,
        cold_e=2,
        candidates=0,
        seed=seed,
    )
    names = [str(folder / "text.jsonl")]
    text = text_to_record(loaded, names, settings, offline=True)
    identity = identity_of(source_of(loaded), text, settings)
    held_out = held_out_of(loaded, identity, names, [], settings, offline=True)
    assert not text.document_hashes & held_out.document_hashes
    lab = Lab(loaded.model)
    statistics = collect(lab, identity, text.tokens, Share(), Ranks())
    (found,) = all_finished(Pipeline(settings).compile(lab, statistics, held_out))
    return dump_profile(found.profile)


def test_a_profile_depends_on_the_seed_but_not_on_the_folder(tmp_path: Path, pico_folder: Path) -> None:
    here, there = (tmp_path / name for name in ("here", "there"))
    dump = calibrated_in(here, pico_folder)
    assert calibrated_in(there, pico_folder) == dump
    assert not any(part in dump for part in ("here", "there", str(tmp_path), tmp_path.name))
    skip, other = (parse_profile(text).skip for text in (dump, calibrated_in(here, pico_folder, seed=1)))
    assert skip.threshold != other.threshold


def test_a_target_that_cannot_be_reached_does_not_cost_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse_the_second(*args: Any) -> Verified:
        if args[3] == TARGETS[1]:
            raise FfnskipError("Out of reach.")
        return verify(*args)

    monkeypatch.setattr("ffnskip_cli.calibration.threshold.goals.verify", refuse_the_second)
    goals = tuple(Goal("target_ratio", target) for target in TARGETS)
    settings = paper_settings(*goals, sequence_length=LENGTH, warm_up=WARM_UP, candidates=0)
    result = calibrations.calibrated(model_of(), TEXT, HELD_OUT, settings)
    reached = [target for target in TARGETS if target != TARGETS[1]]
    assert [c.profile.measured.target_ratio for c in result.finished if c.profile.measured] == reached
    assert result.refused == ["Out of reach."]
