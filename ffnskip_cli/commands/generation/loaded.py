"""A model as transformers loads it, with its tokenizer, for `ffnskip generate`."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ffnskip.decoder import Decoder
from ffnskip.errors import FfnskipError, reason
from ffnskip.model.matrix import PackedFormat
from ffnskip.model.packed import PackedLinear, pack_weights
from ffnskip.model.sites import input_device
from ffnskip.profiles.profile import Profile
from ffnskip_cli import console
from ffnskip_cli.commands import common, loading
from ffnskip_cli.commands.generate import Options
from ffnskip_cli.sources.models import LoadedModel


class LoadedSpeaker:
    """See `ffnskip_cli.commands.generation.speaker.Speaker`.

    Args:
        options: the command line's.
        text: of the prompt.

    Attributes:
        loaded: the model and its tokenizer.

    Raises:
        FfnskipError: the model or the profile cannot be loaded, or the prompt is too long.
    """

    def __init__(self, options: Options, text: str) -> None:
        self.loaded, profile = _load(options)
        self.prompt = self._tokens(text, options.raw)
        length = self.prompt.shape[1] + options.max_new_tokens
        common.refuse_longer(self.loaded.model, length, "shorten the prompt or --max-new-tokens")
        if options.model_options.weights != "auto":
            self._pack(options.model, options.model_options.weights)
        self.decoder = Decoder(self.loaded.model, profile, other_weights=True)  # that was checked
        self.stop_tokens = _stop_tokens(self.loaded)
        dtype = str(self.loaded.model.dtype).removeprefix("torch.")
        self.format = min(_packed_formats(self.loaded), default=dtype)  # int4 before int8
        common.say_path(self.decoder)

    def _pack(self, name: str, weights: PackedFormat) -> None:
        if _packed_formats(self.loaded):
            raise FfnskipError(f"{name} is packed, and stays as it is: leave --weights {weights} out")
        with console.busy(f"Packing weights to {weights}"):
            pack_weights(self.loaded.model, weights)
        console.hint(f"`ffnskip pack {name} --weights {weights} -o FOLDER` packs once, and FOLDER starts sooner.")

    def dense(self) -> Decoder:
        """A decoder without the profile."""
        return Decoder(self.loaded.model, check=False)

    def text(self, tokens: list[int]) -> str:
        """See `Speaker`."""
        return str(self.loaded.tokenizer.decode(tokens, skip_special_tokens=True))

    def _tokens(self, text: str, raw: bool) -> Tensor:
        """``[1, prompt]``, by the model's chat template if it has one."""
        tokens = prompt_tokens(self.loaded, text, raw)
        if tokens.shape[1] == 0:
            raise FfnskipError("The prompt has no tokens: write more, or pass --raw if the chat template drops it.")
        return tokens.to(input_device(self.loaded.model))


def prompt_tokens(loaded: LoadedModel, text: str, raw: bool) -> Tensor:
    """``[1, prompt]``; raises FfnskipError where the chat template fails."""
    if raw or not loaded.tokenizer.chat_template:
        tokens: Tensor = loaded.tokenizer(text, return_tensors="pt")["input_ids"]
        return tokens
    messages = [{"role": "user", "content": text}]
    template: Callable[..., dict[str, Tensor]] = loaded.tokenizer.apply_chat_template
    try:
        return template(messages, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    except Exception as error:  # it is a program of the model's authors
        raise FfnskipError(f"The chat template of {loaded.id} fails ({reason(error)}): pass --raw.") from error


def _packed_formats(loaded: LoadedModel) -> set[str]:
    return {module.format for module in loaded.model.modules() if isinstance(module, PackedLinear)}


def _load(options: Options) -> tuple[LoadedModel, Profile | None]:
    model, model_options = options.model, options.model_options
    if options.profile is None:
        return loading.load(model, model_options, gguf_as_is=True), None
    loaded, profile, _ = loading.load_pair(
        model, options.profile, options.move, model_options, other_weights=options.other_weights, gguf_as_is=True
    )
    return loaded, profile


def _stop_tokens(loaded: LoadedModel) -> set[int]:
    configured = loaded.model.generation_config.eos_token_id
    listed = configured if isinstance(configured, list) else [configured]
    return {token for token in [*listed, loaded.tokenizer.eos_token_id] if token is not None}
