"""Perplexity, KL and agreement against the same figures written out naively on whole logits in float64."""

import math
from functools import cache

import pytest
import torch
from support.calibrations import WARM_UP, quality_of
from support.factories import make_compensated
from support.naive import naive_quality
from support.pico import float64_model, middle_threshold, pico_model, pico_profile, pico_tokens
from torch import Tensor

from ffnskip import FfnskipError, Profile
from ffnskip.general.wrap import Applied
from ffnskip.profiles.identity import model_info
from ffnskip.profiles.weights import Weights
from ffnskip_cli.measure import quality as module
from ffnskip_cli.measure.quality import Estimate, Quality, measure_quality
from ffnskip_cli.opponents.patterns import Pattern
from ffnskip_cli.progress import Journal, silently

MODEL = float64_model()
TEXT = pico_tokens(16, batch=4)
FIGURES = ("nll_dense", "nll", "kl", "top1_agreement", "skip_ratio")


def profile_at(threshold: float) -> Profile:
    return pico_profile(MODEL, threshold=threshold, warm_up=WARM_UP)


@cache
def middle() -> Profile:
    return profile_at(round(middle_threshold(MODEL, TEXT), 4))  # beside the median, which is itself a similarity


def measured(profile: Profile, tokens: Tensor = TEXT) -> Quality:
    return quality_of(MODEL, profile, tokens)


def test_every_figure_is_the_naive_one_with_its_standard_error_over_sequences() -> None:
    quality = measured(middle())
    tables = [naive_quality(MODEL, sequence, middle().skip)[0] for sequence in TEXT]
    for name in FIGURES:
        values = torch.tensor([table[name] for table in tables], dtype=torch.float64)
        estimate: Estimate = getattr(quality, name)
        assert estimate.mean == pytest.approx(float(values.mean()), rel=1e-5)
        assert estimate.standard_error == pytest.approx(float(values.std()) / 2, rel=1e-4)
    assert 0 < quality.top1_agreement.mean < 1
    assert quality.kl.mean > 0.01
    assert (quality.sequences, quality.tokens) == (4, 4 * (16 - 1 - WARM_UP))
    for perplexity, nll in ((quality.perplexity, quality.nll), (quality.perplexity_dense, quality.nll_dense)):
        assert perplexity.mean == math.exp(nll.mean)
        error = math.exp(nll.mean + nll.standard_error) - perplexity.mean
        assert perplexity.standard_error == pytest.approx(error, rel=0.1)


def test_the_kl_of_each_token_has_both_directions() -> None:
    (quality,) = measure_quality(MODEL, [middle()], TEXT, silently, by_token=True)
    assert quality.kl_by_token is not None
    forth, back = quality.kl_by_token
    assert float(forth.mean()) == pytest.approx(quality.kl.mean)
    expected = []
    for sequence in TEXT:
        with torch.no_grad(), Applied(MODEL, profile_at(2.0), "score"):
            p = MODEL(sequence[None]).logits[0].log_softmax(-1)
        with torch.no_grad(), Applied(MODEL, middle(), "score"):
            q = MODEL(sequence[None]).logits[0].log_softmax(-1)
        expected.append(torch.nn.functional.kl_div(p, q, reduction="none", log_target=True).sum(-1)[WARM_UP:-1])
    torch.testing.assert_close(back, torch.cat(expected), rtol=1e-4, atol=1e-6)


def test_a_profile_that_never_skips_changes_nothing_at_all() -> None:
    quality = quality_of(pico_model(), profile_at(2.0), TEXT)
    assert quality.kl == quality.skip_ratio == Estimate(0.0, 0.0)
    assert quality.top1_agreement == Estimate(1.0, 0.0)
    assert quality.nll == quality.nll_dense


def test_profiles_measured_together_do_not_disturb_each_other() -> None:
    profiles = [profile_at(-1.0), middle(), profile_at(2.0)]
    together = measure_quality(MODEL, profiles, TEXT, silently)
    assert together == [measured(profile) for profile in profiles]
    ratios = [quality.skip_ratio.mean for quality in together]
    assert ratios == sorted(ratios, reverse=True)


def test_a_journal_tells_profiles_with_other_weights_and_patterns_apart() -> None:
    journal, past = Journal(), 4 * (16 - WARM_UP)
    own = model_info(MODEL, id="org/pico").model_dump()
    plain = make_compensated("linear", **own, threshold=-1.0, warm_up=WARM_UP)
    half = plain.with_weights(Weights({name: tensor / 2 for name, tensor in plain.weights.tensors.items()}))

    def remembered(profile: Profile, *patterns: Pattern) -> Quality:
        options = {"ways": patterns} if patterns else {}
        (quality,) = measure_quality(MODEL, [profile], TEXT, silently, journal=journal, **options)
        return quality

    first, other, again = (remembered(profile) for profile in (plain, half, plain))
    assert first == again != other
    ruled, forced = remembered(middle()), remembered(middle(), Pattern((1, 2), 1.0, 1.0))
    assert ruled == measured(middle()) != forced
    assert (forced.stats.skipped, sum(forced.stats.checked)) == ([0, past, 0, 0, 0, 0], 0)


def test_counts_are_those_of_all_sequences() -> None:
    stats = measured(profile_at(-1.0)).stats
    past = 4 * (16 - WARM_UP)
    assert (stats.tokens, stats.warm_up_tokens, stats.never_skipped) == (past, 4 * WARM_UP, 0)
    assert stats.skipped == [0, 0, past, past, past, 0]


def test_long_sequences_are_compared_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = measured(middle())
    monkeypatch.setattr(module, "ROWS", 5)
    parts = measured(middle())
    for name in FIGURES:
        assert getattr(parts, name).mean == pytest.approx(getattr(whole, name).mean, rel=1e-6)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [(TEXT[:1], "at least two sequences of text"), (TEXT[:, : WARM_UP + 1], "warm-up of 3 .* in sequences of 4")],
)
def test_too_little_text_is_refused_in_one_sentence(tokens: Tensor, message: str) -> None:
    with pytest.raises(FfnskipError, match=rf"^[^\n]*{message}[^\n]*\.$"):
        measured(middle(), tokens)
    assert measured(middle(), TEXT[:2, : WARM_UP + 2]).tokens == 2


def test_predictions_beyond_all_numbers_keep_a_finite_perplexity_or_are_refused_in_one_sentence() -> None:
    model = pico_model()
    with torch.no_grad():
        model.get_output_embeddings().weight *= 1e4  # very sure of itself, and mostly wrong
    quality = quality_of(model, middle(), TEXT)
    assert quality.nll.mean > 710  # whose exponential is no float
    for estimate in (quality.perplexity, quality.perplexity_dense):
        assert 1e200 < estimate.mean < math.inf
        assert estimate.standard_error < math.inf
    with torch.no_grad():
        model.get_output_embeddings().weight *= math.inf
    with pytest.raises(FfnskipError, match=r"^[^\n]+ not finite numbers: try another --dtype[^\n]+\.$"):
        quality_of(model, middle(), TEXT)
