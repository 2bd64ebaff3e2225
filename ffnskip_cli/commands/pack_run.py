"""What `ffnskip pack` does."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ffnskip.errors import FfnskipError
from ffnskip.files import sync
from ffnskip.model.packed import pack_weights
from ffnskip.model.packed_folder import save_packed
from ffnskip_cli import console
from ffnskip_cli.commands import common, loading
from ffnskip_cli.commands.pack import Options


def run(options: Options) -> None:
    """Load, pack, save, and say how large it is."""
    loaded = loading.load(options.model, options.model_options)
    with console.busy(f"Packing weights to {options.weights}"):
        pack_weights(loaded.model, options.weights)
    with console.busy(f"Writing {options.output}"), _new_folder(options.output) as folder:
        save_packed(loaded.model, folder, id=loaded.id, revision=loaded.revision, gguf_sha256=loaded.gguf_sha256)
        loaded.tokenizer.save_pretrained(folder)
    size = sum(file.stat().st_size for file in options.output.iterdir())
    console.talk.print(f"Wrote {options.output}, {size / 1e6:,.1f} MB.", markup=False)
    common.hint_command("generate", options.output, "Once upon a time")


@contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """A folder beside `target` that takes its name at the end, if all went well: what is there is always whole.

    Raises FfnskipError where it cannot be written.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        try:
            yield partial
            for file in partial.iterdir():
                file.chmod(0o644)  # as any file: some of these, and the folder, are their owner's alone so far
                sync(file)
            partial.chmod(0o755)
            sync(partial)
            os.rename(partial, target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise FfnskipError(f"{target} cannot be written ({error.strerror}).") from error
