"""A model by what an earlier run has kept of it, for `ffnskip generate`, which so starts in a third of the time."""

from __future__ import annotations

import torch

from ffnskip.errors import FfnskipError, UnsupportedModelError
from ffnskip.fast.build import step_key
from ffnskip.fast.engine import read_by_steps
from ffnskip.fast.fused_decoder import FusedDecoder
from ffnskip.fast.stored import stored
from ffnskip.profiles.identity import (
    refuse_other_architecture,
    refuse_other_weights,
    refuse_too_large,
    shared_profile_of,
)
from ffnskip.profiles.locate import is_auto
from ffnskip.profiles.profile import Profile
from ffnskip_cli.commands.generate import Options
from ffnskip_cli.commands.generation import kept
from ffnskip_cli.commands.generation.plain_tokenizer import PlainTokenizer
from ffnskip_cli.sources.devices import pick_device
from ffnskip_cli.sources.locate import Folder
from ffnskip_cli.sources.profiles import read_profile

_SOON_READ = 256  # tokens of a prompt that steps have read before the model could be loaded to read them faster


class QuickSpeaker:
    """See `ffnskip_cli.commands.generation.speaker.Speaker`.

    Args:
        options: the command line's.
        text: of the prompt.
        folder: the model's.
        found: what is kept of it.

    Raises:
        UnsupportedModelError: this does not do for the device or the prompt, though the model does.
        FfnskipError: something is wrong with the prompt or the profile, which loading the model will tell.
        OSError, SafetensorError: files that it was made of, or is kept in, are gone or others by now.
    """

    def __init__(self, options: Options, text: str, folder: Folder, found: kept.Kept) -> None:
        if pick_device(options.model_options.device).type != "cpu" or found.step != step_key():
            raise UnsupportedModelError("It was checked on another device or processor, or by another compiler.")
        if options.model_options.threads is not None:
            torch.set_num_threads(options.model_options.threads)
        entry, dtype = kept.place(folder), getattr(torch, found.dtype)
        self.stop_tokens, self.format = found.stop_tokens, found.format
        self._tokenizer = plain_tokenizer((entry / kept.TOKENIZER).read_text(), found)
        self.prompt = torch.tensor([self._tokenizer.tokens(text, options.raw)])
        length = self.prompt.shape[1]
        reads = length <= _SOON_READ or read_by_steps(length, dtype)
        if not length or length + options.max_new_tokens > found.max_length:
            raise FfnskipError("The prompt is too short or too long.")
        if not reads:
            raise UnsupportedModelError(f"It reads a prompt of {length:,} tokens sooner itself.")
        profile = None if options.profile is None else _profile(options.profile, options, found)
        if profile is not None:
            refuse_too_large(profile, dtype)
        by_input = profile is not None and profile.skip.by.leaves_out_parts
        self.decoder = FusedDecoder(stored(entry, folder.weights, by_input=by_input), profile)
        if not folder.unchanged:
            raise UnsupportedModelError("Its files have changed meanwhile.")

    def text(self, tokens: list[int]) -> str:
        """See `Speaker`."""
        return self._tokenizer.text(tokens)


def plain_tokenizer(state: str, found: kept.Kept) -> PlainTokenizer:
    """The tokenizer that was kept, by the state that the library writes."""
    return PlainTokenizer(state, found.chat_template, found.special_tokens)


def _profile(name: str, options: Options, found: kept.Kept) -> Profile:
    """The profile, with the threshold asked for, if it is one for this model."""
    profile, _ = read_profile(
        shared_profile_of(found.model) if is_auto(name) else name,
        offline=options.model_options.offline,
        with_weights=True,
    )
    profile.refuse_missing_weights()
    refuse_other_architecture(profile, found.model)
    refuse_other_weights(profile, found.model)
    return profile.moved(threshold=options.move.threshold, target=options.move.target)
