"""The section of a model card that describes a skip profile, in Markdown; all its figures are the profile's own."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from ffnskip.compensation.kinds import compensation_name
from ffnskip_cli.report.tables import markdown
from ffnskip_cli.report.words import counted, figure, recorded, rule_sentences, threshold_title
from ffnskip_cli.sources.demo import DEMO_MODEL_SHA256

if TYPE_CHECKING:
    from ffnskip.profiles.evidence import EvaluationText, Measured
    from ffnskip.profiles.profile import Profile
    from ffnskip.profiles.schema import ModelInfo


def card(profile: Profile, name: str) -> str:
    """The section.

    Args:
        profile: what it describes.
        name: by which its readers find the profile: a bare file name, or one on the Hub.
    """
    model, given = shlex.quote(_model_name(profile.model)), shlex.quote(name)
    lines = [
        "## Skip profile for ffnskip",
        "",
        f"A skip profile with which `ffnskip` decodes {markdown(profile.model.id)} in fewer FLOPs. "
        + " ".join(markdown(sentence) for sentence in rule_sentences(profile)),
        "",
        "```sh",
        f"ffnskip apply {model} {given}",
        f'ffnskip generate {model} "Why is the sky blue?" --profile {given}',
        f"ffnskip bench {model} --profile {given}",
        "```",
        "",
    ]
    if profile.measured:
        lines += _table("figure", _figures(profile.measured, profile.evaluation))
        lines += [f"Verdict: {markdown(profile.measured.verdict.rstrip('.'))}.", ""]
    lines += _table("provenance", _provenance(profile, name))
    return "\n".join(lines).rstrip("\n") + "\n"


def _model_name(model: ModelInfo) -> str:
    """What to write for MODEL."""
    if model.gguf_sha256 == DEMO_MODEL_SHA256:
        return "demo"
    return model.id if model.revision is None else f"{model.id}@{model.revision}"


def _table(title: str, rows: Iterable[tuple[str, object]]) -> list[str]:
    cells = [f"| {name} | {markdown(str(value))} |" for name, value in rows if value is not None]
    return [f"| {title} | |", "|:---|:---|", *cells, ""]


def _figures(measured: Measured, text: EvaluationText | None) -> Iterator[tuple[str, object]]:
    past_warm_up, least = measured.flops_saved_past_warm_up, measured.least_skipped
    yield "asked for", measured.goal
    yield "skip ratio", figure(measured, "skip_ratio", ".1%", ".1%")
    yield "FLOPs saved of a whole decode", f"{measured.flops_saved:.1%}"
    yield "FLOPs saved past the warm-up", None if past_warm_up is None else f"{past_warm_up:.1%}"
    yield "KL from the dense model, nats per token", figure(measured, "kl", ".4f", ".4f")
    yield "top-1 agreement", figure(measured, "top1_agreement", ".1%", ".1%")
    yield "perplexity of the dense model", figure(measured, "perplexity_dense", ".4g", ".2g")
    yield "perplexity with the profile", figure(measured, "perplexity", ".4g", ".2g")
    yield "worst case: tokens that skip nothing", f"{measured.never_skip_fraction:.1%}"
    yield "worst case: least of FFN FLOPs that a token leaves out", None if least is None else f"{least:.1%}"
    yield "measured on", None if text is None else counted(text)
    yield "tokens past the warm-up", f"{measured.tokens:,}"


def _provenance(profile: Profile, name: str) -> Iterator[tuple[str, object]]:
    model, skip, calibration = profile.model, profile.skip, profile.calibration
    yield "profile", name
    yield "weights of the profile, SHA-256", profile.compensation.sha256
    yield "model", model.id
    yield "model's commit", model.revision
    yield "model's GGUF file, SHA-256", model.gguf_sha256
    yield "fingerprint of the model's weights", model.weights_sha256
    yield "rule", skip.rule
    yield threshold_title(skip), f"{skip.threshold:g}"
    yield "warm-up, tokens", skip.warm_up
    yield "window", skip.window
    yield "refresh every", skip.refresh_every
    if profile.compensation.kind != "none":
        yield "compensation", compensation_name(profile.compensation)
    if calibration:
        yield "calibrated on", recorded(calibration)
        yield "text, SHA-256", calibration.text_sha256
        yield "seed", calibration.seed
        yield "precision", calibration.dtype
    yield "made with", ", ".join(f"{package} {version}" for package, version in profile.made_with.items())
