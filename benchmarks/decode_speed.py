"""Tokens per second of decode loops and weight formats, taking turns in one run, and what each format costs.

    python benchmarks/decode_speed.py demo 0.25.yaml -o docs/performance.json

prints a table as Markdown. All decode along held-out text, fed token by token. Run it on a machine that does nothing
else. `llama_cpp.py` sets the same formats beside llama.cpp.
"""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from torch import Tensor

from ffnskip import Decoder, Profile, SkipStats, load_profile, pack_weights
from ffnskip.fast.fused_path import FusedDecodes
from ffnskip_cli import console
from ffnskip_cli.measure.flops import mean_keys, model_cost, overhead
from ffnskip_cli.measure.speed import Speed, Way, decoder_way, hugging_face_way, measure_speed
from ffnskip_cli.sources.models import load_model
from ffnskip_cli.text.named import dataset_names, evaluation_text, text_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel

REFERENCE = "Hugging Face generate, bfloat16"


def main(
    model: Annotated[str, typer.Argument(help="The model.")],
    profile: Annotated[Path, typer.Argument(help="Its profile.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="JSON file to write.")],
    repetitions: Annotated[int, typer.Option(help="Timed runs per row.")] = 5,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of each prompt.")] = 128,
    new_tokens: Annotated[int, typer.Option(help="Tokens to generate.")] = 256,
    quality_tokens: Annotated[int, typer.Option(help="Tokens that the quality of a format is measured on.")] = 2048,
) -> None:
    """Measure, write OUTPUT, print a table."""
    ours = load_profile(profile)
    assert ours.evaluation is not None
    assert ours.calibration is not None
    warm_up = ours.skip.warm_up
    loaded = load_model(model, dtype="bfloat16")
    text = evaluation_text(
        loaded,
        text_names(ours.evaluation),
        calibrated_on=dataset_names(ours.calibration),
        tokens=max(quality_tokens, repetitions * (prompt_tokens + new_tokens)),
        sequence_length=prompt_tokens + new_tokens,
        seed=ours.calibration.seed,
        offline=False,
    ).tokens.long()
    wide = load_model(model, dtype="float32").model
    models = {"float32": wide, "bfloat16": loaded.model}
    for format in ("int8", "int4"):
        pack_weights(packed := deepcopy(loaded.model), format)
        models[format] = packed
    ways = _ways(models, ours)
    prompts, forced = text[:, :prompt_tokens], text[:, prompt_tokens:]
    speeds = measure_speed(ways, prompts, new_tokens, repetitions, warm_up, console.track, forced)
    keys = mean_keys(prompt_tokens + warm_up, new_tokens - warm_up)
    rows = [_row(name, speed, speeds, models, ours, keys) for name, speed in speeds.items()]
    sample = text[: quality_tokens // text.shape[1]]
    for format, (kl, agreement) in _quality(wide, models, sample).items():
        next(row for row in rows if row["name"] == f"dense, {format}").update(kl=kl, top1_agreement=agreement)
    document = {
        "model": loaded.id,
        "profile": profile.name,
        "threads": torch.get_num_threads(),
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "timed_on": "text",
        "repetitions": repetitions,
        "rows": rows,
    }
    output.write_text(json.dumps(document, indent=1) + "\n")
    _print(rows)


def _ways(models: dict[str, PreTrainedModel], profile: Profile) -> dict[str, Way]:
    """The rows of this repository and of Hugging Face. Dense decoders are made last: they lay models out by rows."""
    warm_up = profile.skip.warm_up
    skipping = {f"profile, {format}": Decoder(models[format], profile, path="fused") for format in ("bfloat16", "int8")}
    skipping["profile that never skips, bfloat16"] = Decoder(models["bfloat16"], profile.never, path="fused")
    dense = {f"dense, {format}": Decoder(model, path="fused") for format, model in models.items()}
    ours = {name: decoder_way(decoder, warm_up) for name, decoder in (dense | skipping).items()}
    return {REFERENCE: hugging_face_way(models["bfloat16"], warm_up)} | ours


def _row(
    name: str,
    speed: Speed,
    speeds: dict[str, Speed],
    models: dict[str, PreTrainedModel],
    profile: Profile,
    keys: float,
) -> dict[str, Any]:
    kind, _, format = name.partition(", ")
    row: dict[str, Any] = {
        "name": name,
        "tokens_per_second": speed.median,
        "samples": speed.samples,
        "over_hugging_face": speed.speedup_over(speeds[REFERENCE]),
        "breakdown": speed.breakdown,
    }
    if kind.startswith("profile"):
        assert speed.total_stats is not None
        cost = model_cost(models[format])
        row["skip_ratio"] = speed.total_stats.skip_ratio
        row["over_dense"] = speed.speedup_over(speeds[f"dense, {format}"])
        row["ceiling"] = cost.ceiling(speed.total_stats, overhead(profile, models[format]), keys)
    return row


@torch.inference_mode()
def _quality(wide: PreTrainedModel, models: dict[str, PreTrainedModel], text: Tensor) -> dict[str, tuple[float, float]]:
    """KL from the model in float32, nats per token, and top-1 agreement: of the very steps that are timed."""
    totals = {format: torch.zeros(3, dtype=torch.float64) for format in models}
    for sequence in console.track(text, "measuring quality", len(text)):
        expected = wide(sequence[None]).logits[0, 1:].log_softmax(-1)
        for format, model in models.items():
            logits = _step_through(FusedDecodes(model, None, SkipStats(0)), sequence).log_softmax(-1)
            kl = (expected.exp() * (expected - logits)).sum(-1)
            agree = expected.argmax(-1) == logits.argmax(-1)
            totals[format] += torch.tensor([float(kl.sum()), float(agree.sum()), len(kl)], dtype=torch.float64)
    return {format: (float(kl / n), float(agree / n)) for format, (kl, agree, n) in totals.items()}


def _step_through(decodes: FusedDecodes, sequence: Tensor) -> Tensor:
    """Logits ``[length - 1, vocabulary]`` behind every token but the first, each by a decode step."""
    path = decodes.path(max_new_tokens=len(sequence) - 1)
    path.prefill(sequence[None, :1], None)
    running = torch.zeros(1, dtype=torch.bool)
    return torch.stack([path.step(token[None], running)[0].clone() for token in sequence[1:]])


def _print(rows: list[dict[str, Any]]) -> None:
    print("| loop and format | tokens/s | over Hugging Face | over the same loop dense | its ceiling | KL | top-1 |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        cells = [row["name"], f"{median(row['samples']):.1f}", f"{row['over_hugging_face']:.2f}"]
        cells += [f"{row[key]:.2f}" if key in row else "" for key in ("over_dense", "ceiling")]
        cells += [f"{row['kl']:.4f}", f"{row['top1_agreement']:.3f}"] if "kl" in row else ["", ""]
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    typer.run(main)
