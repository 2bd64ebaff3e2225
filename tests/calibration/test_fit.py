"""The whole fit on a pico model: it pays, can be resumed, keeps only what helped; and `--compensate auto`."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from support.calibrations import quality_of
from support.factories import Kind
from support.pico import HIDDEN, N_LAYERS, pico_model, pico_profile, pico_tokens
from torch import Tensor
from transformers import PreTrainedModel

from ffnskip import FfnskipError
from ffnskip.profiles.profile import Profile
from ffnskip.profiles.schema import Compensation
from ffnskip.profiles.weights import Weights
from ffnskip.rules.predicted_damage import PROBE, PROBE_BIAS
from ffnskip_cli.calibration.fit import fitter
from ffnskip_cli.calibration.fit.fitter import FitTask
from ffnskip_cli.calibration.fit.stage import MAX_REFITS, candidates, choose_compensation, fit_weights
from ffnskip_cli.calibration.fit.trial import record_scores
from ffnskip_cli.calibration.lab import Lab
from ffnskip_cli.calibration.recording.record import record_text
from ffnskip_cli.calibration.threshold.solve import solve_threshold
from ffnskip_cli.progress import Journal

LENGTH, RATIO, SEED = 32, 0.3, 0
TEXT, UNSEEN = pico_tokens(LENGTH, batch=80), pico_tokens(LENGTH, batch=24, seed=1)
HELD_BACK = pico_tokens(LENGTH, batch=10, seed=2)


@cache
def llama() -> PreTrainedModel:
    return pico_model()


def draft_of(kind: Kind, rule: str = "predicted-damage", rank: int | None = None, neurons: int = 0) -> Profile:
    compensation = Compensation(kind=kind, rank=rank, neurons=neurons)
    draft = pico_profile(llama(), rule=rule, threshold=0.0 if rule == "predicted-damage" else 0.9)
    return draft.model_copy(update={"compensation": compensation})


def fitted(*draft: Any, text: Tensor = TEXT, journal: Journal | None = None, seed: int = SEED) -> Profile:
    task = FitTask(draft_of(*draft), text, HELD_BACK, RATIO, seed)
    return fit_weights(Lab(llama(), journal=journal or Journal()), task, "ab" * 32)


@cache
def low_rank() -> Profile:
    return fitted("low-rank", "predicted-damage", 6, 8)


def kl_at_ratio(profile: Profile, text: Tensor = UNSEEN) -> float:
    """At the threshold that gives the ratio on this text; by default one that the fit never saw."""
    if profile.skip.rule == "cosine":
        record = record_text(llama(), text)
    else:
        record = record_scores(Lab(llama()), profile, text, 0)
    threshold = solve_threshold(record, profile.skip, RATIO)
    quality = quality_of(llama(), profile.with_threshold(threshold), text)
    assert quality.skip_ratio.mean == pytest.approx(RATIO, abs=0.03)
    return quality.kl.mean


@pytest.mark.parametrize("rule", ["cosine", "predicted-damage"])
def test_a_richer_compensation_costs_less_at_the_same_ratio(rule: str) -> None:
    nothing, mean, linear = (
        kl_at_ratio(draft_of("none", rule) if (kind, rule) == ("none", "cosine") else fitted(kind, rule))
        for kind in ("none", "mean", "linear")
    )
    assert mean < nothing
    assert linear < 0.9 * mean


def test_the_fitted_profile_says_what_it_went_through() -> None:
    profile = low_rank()
    assert (profile.fit.tokens, profile.fit.text_sha256, profile.fit.ratio) == (TEXT.numel(), "ab" * 32, RATIO)
    assert profile.fit.gradient_tokens == len(TEXT) // 2 * LENGTH
    assert 2 <= len(profile.fit.kl) <= 1 + MAX_REFITS
    assert profile.skip.threshold > 0
    as_fitted = profile.skip.model_copy(update={"warm_up": LENGTH // 4})  # text is short: a quarter is left out
    cost = kl_at_ratio(profile.model_copy(update={"skip": as_fitted}), HELD_BACK)
    assert min(profile.fit.kl) == pytest.approx(cost, rel=0.08)  # by interpolation there, measured here
    dtypes = {name: tensor.dtype for name, tensor in profile.weights.tensors.items()} if profile.weights else {}
    assert dtypes.pop(PROBE_BIAS) == torch.float32
    assert dtypes.pop("neurons.index") == torch.int32
    assert set(dtypes.values()) == {torch.bfloat16}


def test_the_probes_beat_those_that_tell_no_token_from_another() -> None:
    """The same compensation with a probe that says the average of each layer's predictions for every token."""
    profile = low_rank()
    scores = record_scores(Lab(llama()), profile, TEXT[:16], 0).values[:, 2:, 1:5]
    means = scores.flatten(0, 1).mean(dim=0)
    shuffled = profile.weights.tensors[PROBE][:, torch.randperm(32, generator=torch.Generator().manual_seed(0))]
    blind = dict(profile.weights.tensors) | {PROBE: shuffled, PROBE_BIAS: means}
    assert kl_at_ratio(profile) < 0.95 * kl_at_ratio(profile.with_weights(Weights(blind)))


def with_costs(monkeypatch: pytest.MonkeyPatch, costs: list[float]) -> tuple[Profile, list[dict[str, Tensor]]]:
    """A real fit, whose held-back KL is replaced by `costs`; what each stage had as weights."""
    stages: list[dict[str, Tensor]] = []
    measure = fitter.HeldBack.measure

    def said(held_back: Any, draft: Profile, tensors: dict[str, Tensor]) -> Any:
        cost = measure(held_back, draft, tensors)
        point = costs[len(stages)]
        stages.append(tensors)
        return type(cost)(cost.threshold, cost.ratio, cost.most, (0.5 * cost.ratio, point), (2 * cost.ratio, point))

    monkeypatch.setattr(fitter.HeldBack, "measure", said)
    return fitted("linear", text=TEXT[:24]), stages


@pytest.mark.parametrize(
    ("costs", "stages_run", "kept"),
    [
        ([1.0, 2.0], 2, 0),  # the refit made it worse
        ([1.0, 0.9, 0.95], 3, 1),
        ([1.0, 0.9, 0.899], 3, 2),  # better, but too little to go on
        ([1.0, 0.9, 0.8, 0.7, 0.6], 5, 4),  # refits end in any case
    ],
)
def test_a_refit_that_does_not_help_is_the_last_and_is_not_kept(
    monkeypatch: pytest.MonkeyPatch, costs: list[float], stages_run: int, kept: int
) -> None:
    profile, stages = with_costs(monkeypatch, costs)
    assert profile.fit.kl == pytest.approx(costs)
    assert len(stages) == stages_run
    assert profile.weights == fitter.stored(stages[kept])
    assert all(profile.weights != fitter.stored(stage) for place, stage in enumerate(stages) if place != kept)


def test_a_fit_that_was_killed_goes_on_with_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    choices = ("low-rank", "predicted-damage", 4, 8)
    whole, real, path = fitted(*choices, text=TEXT[:24]), fitter.observe, tmp_path / "own.journal"

    def killed(*arguments: Any) -> None:
        if arguments[-1].startswith("refit 1"):
            raise KeyboardInterrupt
        real(*arguments)

    monkeypatch.setattr(fitter, "observe", killed)
    with pytest.raises(KeyboardInterrupt):
        fitted(*choices, text=TEXT[:24], journal=Journal(path, "own"))
    assert list(tmp_path.glob("own.journal.*.safetensors"))
    monkeypatch.undo()
    monkeypatch.delattr(fitter, "take_gradients")  # nor are they taken again
    journal = Journal(path, "own", resume=True)
    resumed = fitted(*choices, text=TEXT[:24], journal=journal)
    assert resumed.weights.data == whole.weights.data
    assert resumed == whole
    journal.discard()
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    assert fitted(*choices, text=TEXT[:24], seed=1).weights != whole.weights


def test_too_little_text_is_refused_in_one_sentence_and_the_smallest_that_is_not_can_be_fitted_to() -> None:
    for sequences in (1, 2):
        with pytest.raises(FfnskipError, match=r"^[^\n]+ too few to fit to, which takes 96: [^\n]+\.$"):
            fitted("mean", text=TEXT[:sequences])
    profile = fitted("linear", text=TEXT[:3])
    assert profile.fit.gradient_tokens == LENGTH


def auto_task(cold_s: int = 0, cold_e: int = N_LAYERS) -> FitTask:
    choices = {"rule": "predicted-damage", "threshold": 0.0, "cold_s": cold_s, "cold_e": cold_e, "warm_up": 4}
    return FitTask(pico_profile(llama(), **choices), TEXT[:48], HELD_BACK[:8], 0.25, 0)


def test_the_one_that_saves_most_is_taken_and_all_are_told() -> None:
    chosen, tried, gradients = choose_compensation(Lab(llama()), auto_task(), 0.02)
    assert [(one.kind, one.rank, one.neurons) for one in tried] == [
        (one.kind, one.rank, one.neurons) for one in candidates(llama())
    ]
    best = max(tried, key=lambda one: one.flops_saved)
    assert (chosen.kind, chosen.rank, chosen.neurons) == (best.kind, best.rank, best.neurons)
    assert tried[-1].skip_ratio > tried[0].skip_ratio  # a whole map with neurons does less harm than the mean
    assert gradients.fisher.shape == (N_LAYERS, HIDDEN, HIDDEN)


def test_no_candidate_claims_more_than_the_region_holds() -> None:
    _, tried, _ = choose_compensation(Lab(llama()), auto_task(2, 4), 10.0)
    assert max(one.skip_ratio for one in tried) == pytest.approx(2 / N_LAYERS, abs=1e-3)


def test_neurons_are_left_out_where_they_cannot_be_told_apart() -> None:
    assert all(one.neurons == 0 for one in candidates(pico_model("gpt2")))
    assert Compensation(kind="mean") in candidates(pico_model("gpt2"))
