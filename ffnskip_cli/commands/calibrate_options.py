"""The options of `ffnskip calibrate`, and what their text means."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from ffnskip_cli.calibration.settings import Goal

Datasets = Annotated[
    list[str] | None,
    typer.Option(
        "--dataset",
        metavar="TEXT",
        help="Text to calibrate on: wikitext, c4, gsm8k, any Hub dataset (id[:config[:split]]), a local .txt, .jsonl "
        "or .parquet file, demo (also demo:wiki, demo:c4), or self (sampled from the model). Given several times they "
        "are mixed; TEXT=3 weighs three times as much. Default: wikitext; demo for the demo model.",
        show_default=False,
    ),
]
EvalDatasets = Annotated[
    list[str] | None,
    typer.Option(
        "--eval-dataset",
        metavar="TEXT",
        help="Text to measure quality on; default: a held-out part of --dataset.",
        show_default=False,
    ),
]
Target = Annotated[
    str | None,
    typer.Option(
        metavar="RATIO[,RATIO…]",
        help="Share of all FFNs to skip on the calibration text, such as 0.10; several share one run.",
        show_default=False,
    ),
]
MaxKL = Annotated[
    str | None,
    typer.Option(
        "--max-kl",
        metavar="X[,X…]",
        help="Instead of --target: skip as much as keeps the KL from the dense model within X nats per token.",
        show_default=False,
    ),
]
MaxPerplexityIncrease = Annotated[
    str | None,
    typer.Option(
        metavar="X%[,X%…]",
        help="Instead of --target: skip as much as keeps the perplexity within X% above the dense model's.",
        show_default=False,
    ),
]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        metavar="PATH",
        help="The .yaml file to write, or a folder for RATIO.yaml files. Default: profiles/MODEL/.",
        show_default=False,
    ),
]
Plot = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Draw the profile to a .png, .svg, .pdf or .html file; the .html page explains it, too.",
        show_default=False,
    ),
]
On = Annotated[
    Literal["text", "generated"] | None,
    typer.Option(
        help="Record on the text, in one fast pass (the default), or on what the model generates from it.",
        show_default=False,
    ),
]
Tokens = Annotated[
    int | None,
    typer.Option(metavar="N", min=1, help="Tokens to calibrate on. Default: 16384.", show_default=False),
]
EvalTokens = Annotated[int, typer.Option(metavar="N", min=1, help="Tokens to measure quality on.")]
SequenceLength = Annotated[
    int | None, typer.Option(metavar="N", min=2, help="Tokens per sequence. Default: 256.", show_default=False)
]
Seed = Annotated[
    int | None,
    typer.Option(metavar="N", min=0, max=2**32 - 1, help="Order of the text. Default: 0.", show_default=False),
]
WarmUp = Annotated[
    str,
    typer.Option(
        metavar="N|auto",
        help="Generated tokens that run dense before skipping starts; auto: the smallest number that does no harm.",
    ),
]
Window = Annotated[
    str,
    typer.Option(
        metavar="N|none|auto",
        help="With --rule cosine: FFNs skipped after a trigger at most; none: all up to --cold-e.",
    ),
]
RefreshEvery = Annotated[str, typer.Option(metavar="N|none|auto", help="Run every N-th token dense; none: never.")]
ColdStart = Annotated[
    int | None,
    typer.Option(
        metavar="LAYER",
        min=0,
        help="First layer of the skip region. Default: by what is measured.",
        show_default=False,
    ),
]
ColdEnd = Annotated[
    int | None,
    typer.Option(
        metavar="LAYER",
        min=1,
        help="Layer behind the skip region. Default: by what is measured.",
        show_default=False,
    ),
]
Rule = Annotated[
    Literal["predicted-damage", "cosine"],
    typer.Option(help="When to skip: by the damage that a probe predicts, or by similarity as in the paper."),
]
Compensate = Annotated[
    Literal["auto", "none", "mean", "low-rank", "linear"],
    typer.Option(
        help="What to add in place of a skipped FFN, fitted to the text; auto: what saves most FLOPs at the quality "
        "budget, which takes longer."
    ),
]
Rank = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=1,
        help="Rank of --compensate low-rank. Default: a sixth of the stream's width, a third without neurons.",
        show_default=False,
    ),
]
Neurons = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=0,
        help="How many of each FFN's own neurons are run beside the map. Default: a sixth of them, where they can be "
        "told apart.",
        show_default=False,
    ),
]
FitTokens = Annotated[int, typer.Option(metavar="N", min=1, help="Tokens to fit probe and compensation to.")]
Candidates = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=0,
        help="With --rule cosine: regions, windows and refreshes to try at most; 0: the paper's rule where the curve "
        "is flat. Default: 16.",
        show_default=False,
    ),
]
StatsOut = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Keep the recording in this .safetensors file, to solve for other targets or to --resume.",
        show_default=False,
    ),
]
StatsIn = Annotated[
    list[Path] | None,
    typer.Option(
        metavar="FILE",
        help="Take the recording from this file instead of recording anew; repeat it for all parts of one.",
        show_default=False,
    ),
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on where the run that wrote --stats-out was stopped.")]
Shard = Annotated[
    str | None,
    typer.Option(
        metavar="I/N",
        help="Only record part I of N of the text to --stats-out; solve with --stats-in of all parts.",
        show_default=False,
    ),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Only print what would run at most: forward passes, tokens, memory and time.")
]


def parse_goals(target: str | None, max_kl: str | None, max_perplexity_increase: str | None) -> tuple[Goal, ...]:
    """What to compile profiles for; exactly one of the options may be given."""
    from ffnskip.errors import FfnskipError
    from ffnskip_cli.calibration.settings import Goal

    given = {
        "--target": target,
        "--max-kl": max_kl,
        "--max-perplexity-increase": max_perplexity_increase,
    }
    if len(chosen := {option: text for option, text in given.items() if text is not None}) != 1:
        raise FfnskipError(f"Say what to aim for with exactly one of {', '.join(given)}; --target 0.10 is a start.")
    (option, text), *_ = chosen.items()
    values = _numbers(option, text)
    if len(set(values)) < len(values):
        raise FfnskipError(f"{option} {text} names {'a ratio' if option == '--target' else 'a limit'} twice.")
    match option:
        case "--target":
            return tuple(Goal("target_ratio", value) for value in values)
        case "--max-kl":
            return tuple(Goal("max_kl", value) for value in values)
        case _:
            return tuple(Goal("max_perplexity_increase", value) for value in values)


def _numbers(option: str, text: str) -> list[float]:
    """The numbers between the commas; a perplexity's are per cent."""
    from ffnskip.errors import FfnskipError

    examples = {"--target": "a ratio such as 0.10", "--max-kl": "a limit such as 0.05"}
    if option in examples and "%" in text:
        raise FfnskipError(f"{option} {text} is not {examples[option]}: leave the % out.")
    try:
        numbers = [float(part.removesuffix("%")) for part in text.split(",")]
    except ValueError:
        example = examples.get(option, "a limit such as 2%")
        raise FfnskipError(f"{option} {text} is not {example}, or several with commas between.") from None
    if option in examples:
        return numbers
    if text.count("%") < len(numbers):
        raise FfnskipError(f"{option} {text} lacks its unit: write 2% for two per cent.")
    return [number / 100 for number in numbers]


def parse_count(option: str, text: str, *, least: int, none: bool) -> int | Literal["auto"] | None:
    """A whole number of at least `least`, auto, or, where it is allowed, none."""
    from ffnskip.errors import FfnskipError

    if text == "auto":
        return "auto"
    if none and text == "none":
        return None
    if not (text.isascii() and text.isdigit()) or int(text) < least:
        words = "none or auto" if none else "auto"
        raise FfnskipError(f"{option} must be a whole number from {least} on, {words}, not {text}.")
    return int(text)


def candidates_of(rule: str, candidates: int | None) -> int:
    """How many candidates to try; only the rule `cosine` has any."""
    from ffnskip.errors import FfnskipError

    if rule != "cosine" and candidates:
        raise FfnskipError("--candidates belongs to --rule cosine: with predicted-damage there is no region to search.")
    return 16 if candidates is None else candidates


def parse_shard(text: str) -> tuple[int, int]:
    """`2/8` is the second of eight: index 1, from 0, and count 8."""
    from ffnskip.errors import FfnskipError

    part, _, count = text.partition("/")
    if not (part.isdecimal() and count.isdecimal() and 1 <= int(part) <= int(count)):
        raise FfnskipError(f"--shard {text} is not I/N with I from 1 to N, such as 2/8.")
    return int(part) - 1, int(count)
