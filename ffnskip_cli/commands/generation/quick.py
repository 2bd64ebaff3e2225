"""A model by what an earlier run has kept of it, for `ffnskip generate`, which so starts in a third of the time."""

from __future__ import annotations

from pathlib import Path

import torch

from ffnskip.errors import UnsupportedModelError
from ffnskip.fast.build import library_key
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
from ffnskip_cli.commands.generation.speaker import Show
from ffnskip_cli.sources.devices import pick_device
from ffnskip_cli.sources.profiles import read_profile


class QuickSpeaker:
    """See `ffnskip_cli.commands.generation.speaker.Speaker`.

    Args:
        options: the command line's.
        text: of the prompt.
        folder: the model's.
        found: what is kept of it.

    Raises:
        FfnskipError: this does not do for the prompt, the profile or the device.
    """

    def __init__(self, options: Options, text: str, folder: Path, found: kept.Kept) -> None:
        if pick_device(options.model_options.device).type != "cpu" or found.library != library_key():
            raise UnsupportedModelError("The model was compared with steps of another device or processor.")
        if options.model_options.threads is not None:
            torch.set_num_threads(options.model_options.threads)
        self.stop_tokens, self.format = found.stop_tokens, found.format
        self._tokenizer = plain_tokenizer(kept.place(folder), found)
        tokens = self._tokenizer.tokens(text, options.raw)
        profile = None if options.profile is None else _profile(options.profile, options, found)
        by_input = profile is not None and profile.skip.by.leaves_out_parts
        fused = stored(kept.place(folder), sorted(folder.glob("*.safetensors")), by_input=by_input)
        if profile is not None:
            refuse_too_large(profile, fused.dtype)
        self.decoder = FusedDecoder(fused, profile)
        if not tokens or not self.decoder.takes(len(tokens), options.max_new_tokens):
            raise UnsupportedModelError("The prompt is too short or too long.")
        self.prompt = torch.tensor([tokens])

    def text(self, tokens: list[int]) -> str:
        """See `Speaker`."""
        return self._tokenizer.text(tokens)

    def stream(self) -> Show:
        """See `Speaker`."""
        return self._tokenizer.stream(lambda part: print(part, end="", flush=True))


def plain_tokenizer(entry: Path, found: kept.Kept) -> PlainTokenizer:
    """The tokenizer that was kept."""
    return PlainTokenizer((entry / kept.TOKENIZER).read_text(), found.chat_template, found.special_tokens)


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
