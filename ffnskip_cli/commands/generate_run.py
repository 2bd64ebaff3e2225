"""What `ffnskip generate` does."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ffnskip.errors import FfnskipError
from ffnskip_cli import console
from ffnskip_cli.commands import common
from ffnskip_cli.commands.generate import Options
from ffnskip_cli.commands.generation.search import Search
from ffnskip_cli.commands.generation.speaker import Decodes, Speaker
from ffnskip_cli.commands.generation.stream import Stream
from ffnskip_cli.imports import swift_imports

if TYPE_CHECKING:
    from ffnskip.sampling import Sampling
    from ffnskip.stats import SkipStats

_ENOUGH_TO_TIME = 32  # tokens of an answer
SLOWER = 0.95  # of the dense speed; one answer each cannot tell less apart


def run(options: Options) -> None:
    """Answer the prompt, as a stream or beside the dense model's answer."""
    text = _prompt_text(options.prompt)
    search = Search(options)
    with swift_imports():
        from ffnskip.sampling import Sampling  # and torch, while the search goes on

    sampling = Sampling(options.temperature, options.top_p, options.seed)
    if (quick := search.speaker(text)) is not None:
        _say_what_to_expect(options, quick)
        _write(quick, quick.decoder, options, sampling, streamed=True)
        return
    with swift_imports():
        from ffnskip_cli.commands.generation.keep import keep
        from ffnskip_cli.commands.generation.loaded import LoadedSpeaker

    speaker = LoadedSpeaker(options, text)
    _say_what_to_expect(options, speaker)
    if not options.compare:
        answer = _write(speaker, speaker.decoder, options, sampling, streamed=True)
        keep(options, speaker, answer.tokens)
        return
    answer = _write(speaker, speaker.decoder, options, sampling)
    dense = _write(speaker, speaker.dense(), options, sampling)
    _side_by_side(speaker.text(dense.tokens), speaker.text(answer.tokens))
    _warn_if_slower(answer.times, dense.times)


def _say_what_to_expect(options: Options, speaker: Speaker) -> None:
    """What a profile costs in quality; and in time, where inputs are left out of matrices of 4 bits."""
    if (profile := speaker.decoder.profile) is None:
        return
    common.say_expected_cost(profile, options.move)
    if profile.skip.rule == "price" and speaker.format == "int4":
        console.talk.print("In 4 bits this rule mostly costs time: --compare shows what it does here.", highlight=False)


def _prompt_text(prompt: str) -> str:
    try:
        text = sys.stdin.read() if prompt == "-" else prompt
        text.encode()  # what the shell hands over may be any bytes
    except UnicodeError:
        raise FfnskipError("The prompt is not UTF-8 text.") from None
    if not text:
        raise FfnskipError("The prompt is empty.")
    return text


@dataclass(frozen=True)
class _Answer:
    tokens: list[int]
    times: list[float]  # when each token came, in seconds


def _write(
    speaker: Speaker, decoder: Decodes, options: Options, sampling: Sampling, *, streamed: bool = False
) -> _Answer:
    """Answer the prompt, if it is streamed to stdout as the tokens come, and say how it went."""
    stream = Stream(speaker.text, lambda part: print(part, end="", flush=True)) if streamed else None
    tokens: list[int] = []
    times: list[float] = []
    for token in decoder.decode(
        speaker.prompt, max_new_tokens=options.max_new_tokens, sampling=sampling, stop_tokens=speaker.stop_tokens
    ):
        tokens.append(int(token[0]))
        times.append(time.perf_counter())
        if stream is not None:
            stream(tokens[-1])
    if stream is not None:
        stream.end()
    _say_how_it_went(times, None if decoder.profile is None else decoder.stats)
    return _Answer(tokens, times)


def _say_how_it_went(times: list[float], stats: SkipStats | None) -> None:
    speed = f"{_tokens_per_second(times):.1f} tokens/s" if len(times) > 1 else "too short to time"
    line = f"{'dense' if stats is None else 'ffnskip'}: {len(times)} tokens, {speed}"
    if stats is not None:
        if stats.tokens == 0:
            line += ", all of them warm-up: nothing could be skipped yet"
        else:
            line += f", skip_ratio {stats.skip_ratio:.3f}, never_skip_fraction {stats.never_skip_fraction:.3f}"
            line += f" over {stats.tokens} tokens past warm-up"
    console.talk.print(line)


def _tokens_per_second(times: list[float]) -> float:
    return (len(times) - 1) / (times[-1] - times[0])


def _warn_if_slower(times: list[float], dense_times: list[float]) -> None:
    """Say so of a profile that lost time on answers long enough to tell."""
    if min(len(times), len(dense_times)) < _ENOUGH_TO_TIME:
        return
    speed, dense = _tokens_per_second(times), _tokens_per_second(dense_times)
    if speed < SLOWER * dense:
        common.warn_of_slower_profile("In this answer", f"{speed:.1f} against {dense:.1f} tokens/s")


def _side_by_side(dense: str, skipping: str) -> None:
    table = Table(expand=True)
    for column in ("dense", "ffnskip"):
        table.add_column(column, ratio=1)
    table.add_row(Text(dense.strip()), Text(skipping.strip()))
    Console().print(table)
