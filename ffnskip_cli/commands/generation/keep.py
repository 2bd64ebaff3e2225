"""Keep of a model what the next run of `ffnskip generate` needs to start without transformers."""

from __future__ import annotations

import os
from pathlib import Path

from ffnskip.cached import build_once, discard
from ffnskip.errors import FfnskipError, UnsupportedModelError, reason
from ffnskip.fast.build import step_key
from ffnskip.fast.engine import Steps
from ffnskip.fast.fused_model import FusedModel
from ffnskip.fast.stored import store
from ffnskip.profiles.identity import model_info
from ffnskip_cli import console
from ffnskip_cli.commands.generate import Options
from ffnskip_cli.commands.generation import kept
from ffnskip_cli.commands.generation.loaded import LoadedSpeaker, prompt_tokens
from ffnskip_cli.commands.generation.plain_tokenizer import PlainTokenizer
from ffnskip_cli.commands.generation.quick import plain_tokenizer
from ffnskip_cli.sources.locate import Folder
from ffnskip_cli.sources.models import LoadedModel

_PROBE = "  A prompt, \u00fcber\u00adall \U0001f600\u65e5\u672c:\n\n\tx = [1, 2]  # 'don't' "


def keep(options: Options, speaker: LoadedSpeaker, answer: list[int]) -> None:
    """Keep it of a model that has just answered, if it does what the model does.

    Args:
        options: of this run.
        speaker: the model.
        answer: tokens that it has generated.
    """
    fused, folder = speaker.decoder.fused, speaker.loaded.folder
    if fused is None or fused.device.type != "cpu" or folder is None or not kept.allows(options):
        return
    try:
        found = kept.find(folder)
        if found is None or found.step != step_key():
            with console.busy("Keeping what the next start needs"):
                _keep(speaker, fused, folder, answer)
    except Exception as error:  # the answer is there, and stays right
        console.talk.print(f"The next start will take as long: {reason(error)}", markup=False, highlight=False)


def _keep(speaker: LoadedSpeaker, fused: FusedModel, folder: Folder, answer: list[int]) -> None:
    loaded, entry = speaker.loaded, kept.place(folder)
    found = kept.Kept(
        folder=str(folder.path),
        files=folder.files,
        why_not=None,
        step=step_key(),
        model=model_info(loaded.model, id=loaded.id, revision=loaded.revision, gguf_sha256=loaded.gguf_sha256),
        dtype=str(fused.dtype).removeprefix("torch."),
        format=speaker.format,
        max_length=fused.max_length,
        chat_template=None,
        special_tokens=dict(loaded.tokenizer.special_tokens_map),
        stop_tokens=tuple(sorted(speaker.stop_tokens)),
    )
    _forget_what_is_gone(folder)
    discard(entry)  # of another library
    try:
        found = found.model_copy(update={"chat_template": _template(loaded)})
        state = _state(loaded, found, answer)
        Steps(fused, None).check(loaded.model)  # prompts, too, which the model itself may have read until now

        def build(into: Path) -> None:
            store(fused, loaded.model, folder.weights, into)
            (into / kept.TOKENIZER).write_text(state)
            _write(found, into)
            if not folder.unchanged:
                raise FfnskipError("the model's files have changed meanwhile")

        build_once(entry, build)
    except UnsupportedModelError as error:  # which is kept, or each run would try again
        refused = found.model_copy(update={"why_not": str(error)})
        build_once(entry, lambda into: _write(refused, into))


def _write(found: kept.Kept, into: Path) -> None:
    (into / kept.SETTINGS).write_text(found.model_dump_json(indent=1))


def _template(loaded: LoadedModel) -> str | None:
    try:
        return str(loaded.tokenizer.get_chat_template()) if loaded.tokenizer.chat_template else None
    except ValueError as error:  # there are several, and none by default
        raise UnsupportedModelError(f"The tokenizer has no one chat template: {reason(error)}") from error


def _state(loaded: LoadedModel, found: kept.Kept, answer: list[int]) -> str:
    """The state of the library's tokenizer behind that of transformers.

    Raises UnsupportedModelError unless both turn text into the same tokens, and these into the same text. One probe
    holds every special token, which a prompt may spell.
    """
    tokenizer = loaded.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or getattr(tokenizer, "clean_up_tokenization_spaces", False):
        raise UnsupportedModelError("The tokenizer does more than that of the library behind it.")
    state: str = backend.to_str()
    plain = plain_tokenizer(state, found)
    for text in (_PROBE, " ".join(tokenizer.all_special_tokens), "a"):
        for raw in (True, False):
            if _tokens(plain, text, raw) != _tokens(loaded, text, raw):
                raise UnsupportedModelError("The tokenizer gives other tokens than the library behind it.")
    tokens = [*answer, *(_tokens(loaded, _PROBE, True) or [])]
    if plain.text(tokens) != tokenizer.decode(tokens, skip_special_tokens=True):
        raise UnsupportedModelError("The tokenizer gives another text than the library behind it.")
    return state


def _tokens(by: PlainTokenizer | LoadedModel, text: str, raw: bool) -> list[int] | None:
    """None where the chat template refuses the text."""
    try:
        return by.tokens(text, raw) if isinstance(by, PlainTokenizer) else prompt_tokens(by, text, raw)[0].tolist()
    except FfnskipError:
        return None


def _forget_what_is_gone(folder: Folder) -> None:
    """Remove what is kept of models whose folders are no longer there, and of this one as it was before."""
    for entry in kept.entries().glob("[!.]*"):
        other = kept.read(entry)
        before = other is not None and other.folder == str(folder.path) and other.files != folder.files
        if other is not None and (before or not os.path.exists(other.folder)):
            discard(entry)
