"""Keep of a model what the next run of `ffnskip generate` needs to start without transformers."""

from __future__ import annotations

from pathlib import Path

from ffnskip.cached import build_once, discard
from ffnskip.errors import FfnskipError, UnsupportedModelError
from ffnskip.fast.build import library_key
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
    if fused is None or folder is None or not kept.allows(options) or kept.find(folder) is not None:
        return
    try:
        with console.busy("Keeping what the next start needs"):
            _keep(speaker, fused, folder, answer)
    except UnsupportedModelError:
        return  # this model starts as it has always done
    except FfnskipError as error:
        console.talk.print(f"The next start will take as long: {error}", markup=False, highlight=False)


def _keep(speaker: LoadedSpeaker, fused: FusedModel, folder: Path, answer: list[int]) -> None:
    loaded = speaker.loaded
    Steps(fused, None).check(loaded.model)  # prompts, too, which the model itself may have read until now
    tokenizer = loaded.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or getattr(tokenizer, "clean_up_tokenization_spaces", False):
        raise UnsupportedModelError("The tokenizer does more than that of the library behind it.")
    found = kept.Kept(
        folder=str(folder),
        stamp=kept.stamp(folder),
        library=library_key(),
        model=model_info(loaded.model, id=loaded.id, revision=loaded.revision, gguf_sha256=loaded.gguf_sha256),
        format=speaker.format,
        chat_template=tokenizer.get_chat_template() if tokenizer.chat_template else None,
        special_tokens=dict(tokenizer.special_tokens_map),
        stop_tokens=tuple(sorted(speaker.stop_tokens)),
    )

    def build(into: Path) -> None:
        store(fused, loaded.model, sorted(folder.glob("*.safetensors")), into)
        (into / kept.SETTINGS).write_text(found.model_dump_json(indent=1))
        (into / kept.TOKENIZER).write_text(backend.to_str())
        _compare(plain_tokenizer(into, found), loaded, answer)

    _forget_what_is_gone()
    discard(kept.place(folder))
    build_once(kept.place(folder), build)


def _compare(plain: PlainTokenizer, loaded: LoadedModel, answer: list[int]) -> None:
    """Raise UnsupportedModelError unless both tokenizers turn text into the same tokens, and these into the same text.

    One probe holds every special token, which a prompt may spell.
    """
    for text in (_PROBE, " ".join(loaded.tokenizer.all_special_tokens), "a"):
        for raw in (True, False):
            if _tokens(plain, text, raw) != _tokens(loaded, text, raw):
                raise UnsupportedModelError("The tokenizer gives other tokens than the library behind it.")
    tokens = [*answer, *(_tokens(loaded, _PROBE, True) or [])]
    if plain.text(tokens) != loaded.tokenizer.decode(tokens, skip_special_tokens=True):
        raise UnsupportedModelError("The tokenizer gives another text than the library behind it.")


def _tokens(by: PlainTokenizer | LoadedModel, text: str, raw: bool) -> list[int] | None:
    """None where the chat template refuses the text."""
    try:
        return by.tokens(text, raw) if isinstance(by, PlainTokenizer) else prompt_tokens(by, text, raw)[0].tolist()
    except FfnskipError:
        return None


def _forget_what_is_gone() -> None:
    """Remove what is kept of models whose folders are no longer there."""
    for entry in kept.place(Path()).parent.glob("[!.]*"):
        settings = kept.read(entry)
        if settings is not None and not Path(settings.folder).exists():
            discard(entry)
