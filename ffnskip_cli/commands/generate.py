"""`ffnskip generate`."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ffnskip_cli import console
from ffnskip_cli.commands import options

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from ffnskip import Decoder, Sampling, SkipStats
    from ffnskip_cli.sources.models import LoadedModel


def command(
    model: options.ModelName,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What to continue or answer; - reads it from stdin.")],
    profile: Annotated[
        Path | None, typer.Option("--profile", "-p", metavar="FILE", help="The skip profile; none: dense.")
    ] = None,
    threshold: options.Threshold = None,
    target: options.Target = None,
    max_new_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Tokens to generate at most.")] = 128,
    temperature: Annotated[float, typer.Option(metavar="X", min=0.0, help="0 is greedy.")] = 0.0,
    top_p: Annotated[
        float, typer.Option(metavar="X", min=0.0, max=1.0, help="Sample from the likeliest tokens of this mass.")
    ] = 1.0,
    seed: options.Seed = 0,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the prompt as it is, no chat template.")] = False,
    compare: Annotated[
        bool, typer.Option("--compare", help="Show the dense model's answer next to it, from the same --weights.")
    ] = False,
    dtype: options.Dtype = "auto",
    weights: options.WeightFormat = "auto",
    device: options.Device = "auto",
    device_map: options.DeviceMap = None,
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    offline: options.Offline = False,
) -> None:
    """Generate text with a skip profile on, token by token.

    The text goes to stdout; tokens per second, skip_ratio and never_skip_fraction go to stderr.
    """
    from ffnskip.errors import FfnskipError
    from ffnskip.profiles.profile import load_profile

    if profile is None and compare:
        raise FfnskipError("--compare needs a --profile to compare with the dense model.")
    if profile is None and threshold is not None:
        raise FfnskipError("--threshold needs a --profile whose threshold it replaces.")
    if profile is None and target is not None:
        raise FfnskipError("--target needs a --profile along whose curve it moves.")
    skip_profile = load_profile(profile).moved(threshold=threshold, target=target) if profile is not None else None
    text = _prompt_text(prompt)
    with console.busy("Starting"):
        import ffnskip

    sampling = ffnskip.Sampling(temperature, top_p, seed)
    loaded = options.load(
        model,
        dtype=dtype,
        device=device,
        device_map=device_map,
        revision=revision,
        trust_remote_code=trust_remote_code,
        offline=offline,
    )
    tokens = _prompt_tokens(loaded, text, raw)
    options.refuse_longer(loaded.model, tokens.shape[1] + max_new_tokens, "shorten the prompt or --max-new-tokens")
    if weights != "auto":
        with console.busy(f"Packing weights to {weights}"):
            ffnskip.pack_weights(loaded.model, weights)
    decoder = ffnskip.Decoder(loaded.model, skip_profile)
    options.say_path(decoder)
    if skip_profile is not None:
        options.say_expected_cost(skip_profile, threshold, target)
    writer = _Writer(loaded, tokens, max_new_tokens, sampling)
    answer = writer.write(None if compare else _stream(loaded), decoder)
    if compare:
        _side_by_side(writer.write(None, ffnskip.Decoder(loaded.model, check=False)), answer)


def _prompt_text(prompt: str) -> str:
    from ffnskip.errors import FfnskipError

    try:
        text = sys.stdin.read() if prompt == "-" else prompt
        text.encode()  # what the shell hands over may be any bytes
    except UnicodeError:
        raise FfnskipError("The prompt is not UTF-8 text.") from None
    if not text:
        raise FfnskipError("The prompt is empty.")
    return text


class _Writer:
    """Generates from one prompt, and says how it went."""

    def __init__(self, loaded: LoadedModel, prompt: Tensor, max_new_tokens: int, sampling: Sampling) -> None:
        self._loaded = loaded
        self._prompt = prompt
        self._max_new_tokens = max_new_tokens
        self._sampling = sampling

    def write(self, show: Callable[[int | None], None] | None, decoder: Decoder) -> str:
        """Generate, showing each token (and None at the end) as it comes; returns the text."""
        tokens: list[int] = []
        times: list[float] = []
        stop = _stop_tokens(self._loaded)
        for token in decoder.decode(
            self._prompt,
            max_new_tokens=self._max_new_tokens,
            sampling=self._sampling,
            stop_tokens=stop,
        ):
            tokens.append(int(token[0]))
            times.append(time.perf_counter())
            if show is not None:
                show(tokens[-1])
        if show is not None:
            show(None)
        _say_how_it_went(times, None if decoder.profile is None else decoder.stats)
        return str(self._loaded.tokenizer.decode(tokens, skip_special_tokens=True))


def _prompt_tokens(loaded: LoadedModel, text: str, raw: bool) -> Tensor:
    """``[1, prompt]``, by the model's chat template if it has one."""
    from ffnskip.model.sites import input_device

    if raw or not loaded.tokenizer.chat_template:
        tokens: Tensor = loaded.tokenizer(text, return_tensors="pt")["input_ids"]
    else:
        messages = [{"role": "user", "content": text}]
        template = loaded.tokenizer.apply_chat_template
        tokens = template(messages, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    return tokens.to(input_device(loaded.model))


def _stop_tokens(loaded: LoadedModel) -> set[int]:
    configured = loaded.model.generation_config.eos_token_id
    listed = configured if isinstance(configured, list) else [configured]
    return {token for token in [*listed, loaded.tokenizer.eos_token_id] if token is not None}


def _stream(loaded: LoadedModel) -> Callable[[int | None], None]:
    """Prints whole words to stdout as their tokens arrive."""
    import torch
    from transformers import TextStreamer

    streamer = TextStreamer(loaded.tokenizer, skip_special_tokens=True)

    def show(token: int | None) -> None:
        if token is None:
            streamer.end()
        else:
            streamer.put(torch.tensor([token]))

    return show


def _say_how_it_went(times: list[float], stats: SkipStats | None) -> None:
    speed = f"{(len(times) - 1) / (times[-1] - times[0]):.1f} tokens/s" if len(times) > 1 else "too short to time"
    line = f"{'dense' if stats is None else 'ffnskip'}: {len(times)} tokens, {speed}"
    if stats is not None:
        if stats.tokens == 0:
            line += ", all of them warm-up: nothing could be skipped yet"
        else:
            line += f", skip_ratio {stats.skip_ratio:.3f}, never_skip_fraction {stats.never_skip_fraction:.3f}"
            line += f" over {stats.tokens} tokens past warm-up"
    console.talk.print(line)


def _side_by_side(dense: str, skipping: str) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(expand=True)
    for column in ("dense", "ffnskip"):
        table.add_column(column, ratio=1)
    table.add_row(Text(dense.strip()), Text(skipping.strip()))
    Console().print(table)
