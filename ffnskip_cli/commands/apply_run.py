"""What `ffnskip apply` does."""

import torch

from ffnskip.errors import FfnskipError
from ffnskip.general.apply import apply
from ffnskip.general.wrap import Applied
from ffnskip.model.forward import forward
from ffnskip.model.sites import input_device
from ffnskip_cli import console
from ffnskip_cli.commands import common, loading
from ffnskip_cli.commands.apply import Options
from ffnskip_cli.commands.options import Format
from ffnskip_cli.report.tables import Column, print_json, render

# What is scored when no text is named; any ordinary prose will do, as long as it is longer than a warm-up.
SAMPLE = (
    "A lighthouse keeper's day began before the sun was up. The lamp had to be trimmed, the lenses wiped free of "
    "soot and salt, and the clockwork that turned them wound by hand, a hundred turns of the crank. Then came the "
    "log: wind from the north-west, sea moderate, two schooners and a coal barge passed. In winter the boat from "
    "the mainland came once a month, if the weather let it land at all, with flour, oil, letters and newspapers "
    "that were already history. Yet many keepers stayed for decades. When the lamps were electrified and the last "
    "of them went ashore, some said that what they missed most was not the sea or the quiet but the certainty "
    "that somebody, somewhere out in the dark, was looking for their light."
)


def run(options: Options) -> None:
    """Check the profile on its model, then score the sample and print what is skipped."""
    model, move = options.model, options.move
    loaded, profile, _ = loading.load_pair(
        model, options.profile, move, options.model_options, other_weights=options.other_weights, gguf_as_is=True
    )
    with apply(loaded.model, profile, mode="score", other_weights=True) as applied:  # that was checked
        tokens = loaded.tokenizer(SAMPLE, return_tensors="pt")["input_ids"].to(input_device(loaded.model))
        with torch.inference_mode():
            forward(loaded.model, tokens, use_cache=False)
        console.talk.print(
            "Self-check passed: all that may skip is wrapped; with skipping disabled the logits are identical."
        )
        if applied.stats.tokens == 0:
            warm_up = applied.profile.skip.warm_up
            raise FfnskipError(f"The sample ends before the warm-up of {warm_up} tokens does: nothing to report.")
    _report(applied, options.format)
    common.say_expected_cost(profile, move)
    moved = [("--threshold", move.threshold), ("--target", move.target)]
    same = [word for option, value in moved if value is not None for word in (option, value)]
    same += ["--other-weights"] * options.other_weights
    common.hint_command("generate", model, "Once upon a time", "--profile", options.profile, *same)


def _report(applied: Applied, format: Format) -> None:
    skip, stats = applied.profile.skip, applied.stats
    layers = [
        {
            "layer": layer,
            "skipped": stats.skipped[layer] / stats.tokens,
            "first_skipped": stats.first_skipped[layer] / stats.tokens,
            "left_out": stats.left_out[layer] / stats.tokens,
        }
        for layer in range(skip.cold_s, skip.cold_e)
    ]
    if format == "json":
        summary = {
            "schema": "ffnskip-apply/v1",
            "model": applied.profile.model.id,
            "threshold": skip.threshold,
            "tokens": stats.tokens,
            "skip_ratio": stats.skip_ratio,
            "never_skip_fraction": stats.never_skip_fraction,
        }
        print_json(summary | {"layers": layers})
        return
    whole = [Column("skipped", "tokens that skip its FFN", ".1%"), Column("first_skipped", "as their first", ".1%")]
    parts = [Column("left_out", "of its FFN's FLOPs left out", ".1%")]
    render(layers, [Column("layer", "layer", "d"), *(parts if skip.by.leaves_out_parts else whole)], format)
    console.talk.print(
        f"On a sample of {stats.tokens} tokens past warm-up: skip_ratio {stats.skip_ratio:.3f}, "
        f"never_skip_fraction {stats.never_skip_fraction:.3f}."
    )
