"""What `ffnskip generate` does."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from ffnskip.decoder import Decoder
from ffnskip.errors import FfnskipError
from ffnskip.hub import reason
from ffnskip.model.packed import PackedLinear, pack_weights
from ffnskip.model.sites import input_device
from ffnskip.profiles.profile import Profile
from ffnskip.sampling import Sampling
from ffnskip.stats import SkipStats
from ffnskip_cli import console
from ffnskip_cli.commands import common
from ffnskip_cli.commands.generate import Options
from ffnskip_cli.sources.models import LoadedModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ENOUGH_TO_TIME = 32  # tokens of an answer
SLOWER = 0.95  # of the dense speed; one answer each cannot tell less apart


def run(options: Options) -> None:
    """Answer the prompt, as a stream or beside the dense model's answer."""
    text = _prompt_text(options.prompt)
    sampling = Sampling(options.temperature, options.top_p, options.seed)
    loaded, profile = _load(options)
    tokens = _prompt_tokens(loaded, text, options.raw)
    length = tokens.shape[1] + options.max_new_tokens
    common.refuse_longer(loaded.model, length, "shorten the prompt or --max-new-tokens")
    if (weights := options.model_options.weights) != "auto":
        with console.busy(f"Packing weights to {weights}"):
            pack_weights(loaded.model, weights)
    decoder = Decoder(loaded.model, profile, other_weights=True)  # that was checked
    common.say_path(decoder)
    if profile is not None:
        common.say_expected_cost(profile, options.move)
        _say_if_dense_is_faster(loaded.model, profile, decoder)
    writer = _Writer(loaded, tokens, options.max_new_tokens, sampling)
    answer = writer.write(None if options.compare else _stream(loaded), decoder)
    if options.compare:
        dense = writer.write(None, Decoder(loaded.model, check=False))
        _side_by_side(dense.text, answer.text)
        _warn_if_slower(answer.times, dense.times)


def _say_if_dense_is_faster(model: PreTrainedModel, profile: Profile, decoder: Decoder) -> None:
    """Where inputs are left out of matrices of 4 bits, which costs more than it saves on most machines."""
    in_4_bits = any(isinstance(module, PackedLinear) and module.format == "int4" for module in model.modules())
    if in_4_bits and profile.skip.rule == "price" and decoder.path == "fused":
        console.talk.print("In 4 bits this rule mostly costs time: --compare shows what it does here.", highlight=False)


def _load(options: Options) -> tuple[LoadedModel, Profile | None]:
    model, model_options = options.model, options.model_options
    if options.profile is None:
        return common.load(model, model_options, gguf_as_is=True), None
    loaded, profile, _ = common.load_pair(
        model, options.profile, options.move, model_options, other_weights=options.other_weights, gguf_as_is=True
    )
    return loaded, profile


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
    text: str
    times: list[float]  # when each token came, in seconds


class _Writer:
    """Generates from one prompt, and says how it went."""

    def __init__(self, loaded: LoadedModel, prompt: Tensor, max_new_tokens: int, sampling: Sampling) -> None:
        self._loaded = loaded
        self._prompt = prompt
        self._max_new_tokens = max_new_tokens
        self._sampling = sampling

    def write(self, show: Callable[[int | None], None] | None, decoder: Decoder) -> _Answer:
        """Generate, showing each token (and None at the end) as it comes."""
        tokens: list[int] = []
        times: list[float] = []
        stop = _stop_tokens(self._loaded)
        for token in decoder.decode(
            self._prompt, max_new_tokens=self._max_new_tokens, sampling=self._sampling, stop_tokens=stop
        ):
            tokens.append(int(token[0]))
            times.append(time.perf_counter())
            if show is not None:
                show(tokens[-1])
        if show is not None:
            show(None)
        _say_how_it_went(times, None if decoder.profile is None else decoder.stats)
        return _Answer(str(self._loaded.tokenizer.decode(tokens, skip_special_tokens=True)), times)


def _prompt_tokens(loaded: LoadedModel, text: str, raw: bool) -> Tensor:
    """``[1, prompt]``, by the model's chat template if it has one."""
    if raw or not loaded.tokenizer.chat_template:
        tokens: Tensor = loaded.tokenizer(text, return_tensors="pt")["input_ids"]
    else:
        tokens = _by_chat_template(loaded, text)
    if tokens.shape[1] == 0:
        raise FfnskipError("The prompt has no tokens: write more, or pass --raw if the chat template drops it.")
    return tokens.to(input_device(loaded.model))


def _by_chat_template(loaded: LoadedModel, text: str) -> Tensor:
    messages = [{"role": "user", "content": text}]
    template = loaded.tokenizer.apply_chat_template
    try:
        tokens: Tensor = template(messages, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    except Exception as error:  # it is a program of the model's authors
        raise FfnskipError(f"The chat template of {loaded.id} fails ({reason(error)}): pass --raw.") from error
    return tokens


def _stop_tokens(loaded: LoadedModel) -> set[int]:
    configured = loaded.model.generation_config.eos_token_id
    listed = configured if isinstance(configured, list) else [configured]
    return {token for token in [*listed, loaded.tokenizer.eos_token_id] if token is not None}


def _stream(loaded: LoadedModel) -> Callable[[int | None], None]:
    """Prints whole words to stdout as their tokens arrive."""
    from transformers import TextStreamer

    streamer = TextStreamer(loaded.tokenizer, skip_special_tokens=True)

    def show(token: int | None) -> None:
        if token is None:
            streamer.end()
        else:
            streamer.put(torch.tensor([token]))

    return show


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
