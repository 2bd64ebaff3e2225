"""Step 2, continued: record a whole text, or this machine's share of it, and survive being killed."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ffnskip.errors import FfnskipError
from ffnskip.identity import model_info
from ffnskip_cli.calibration import assemble
from ffnskip_cli.calibration.corpus import Corpus
from ffnskip_cli.calibration.ranks import Ranks
from ffnskip_cli.calibration.record import BLOCK, record_block
from ffnskip_cli.calibration.settings import On, Settings
from ffnskip_cli.calibration.statistics import Identity, Source, Statistics, load_statistics, refuse_difference
from ffnskip_cli.track import Track

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ffnskip_cli.sources.models import LoadedModel

SECONDS_BETWEEN_SAVES = 20.0  # what a kill can cost, besides the block at work
_SAMPLE = 256  # elements of each weight that its fingerprint looks at


@dataclass(frozen=True)
class Share:
    """Which blocks of the text this process records, and where it keeps them.

    Attributes:
        index, count: this is share `index`, from 0, of `count`.
        path: the statistics file; None to keep nothing on disk.
        resume: go on with what the file holds.
    """

    index: int = 0
    count: int = 1
    path: Path | None = None
    resume: bool = False

    @property
    def is_part(self) -> bool:
        """Whether others record the rest."""
        return self.count > 1

    def of_rank(self, ranks: Ranks) -> Share:
        """The share of one rank, in a file of its own beside the whole, to which each rank can return by itself."""
        if ranks.size == 1:
            return self
        path = self.path and self.path.with_name(f"{self.path.name}.{ranks.rank + 1}-of-{ranks.size}")
        return Share(ranks.rank, ranks.size, path, self.resume)


def source_of(loaded: LoadedModel) -> Source:
    """What identifies the model and tokenizer at hand."""
    model = loaded.model
    vocabulary = sorted(loaded.tokenizer.get_vocab().items(), key=lambda entry: (entry[1], entry[0]))
    return Source(
        model_info(model, id=loaded.id, revision=loaded.revision, gguf_sha256=loaded.gguf_sha256),
        weights_sha256=_fingerprint(model),
        tokenizer_sha256=hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest(),
        dtype=str(model.dtype).removeprefix("torch."),
    )


def identity_of(source: Source, text: Corpus, settings: Settings) -> Identity:
    """What a recording of `text` depends on."""
    return Identity(source, assemble.calibration_text(text, settings, source.dtype), text.document_hashes)


def blocks_of(share: Share, sequences: int, on: On) -> list[Tensor]:
    """The places of the sequences that a share records, in blocks that are recorded together."""
    return list(torch.arange(sequences).split(BLOCK[on])[share.index :: share.count])


def collect(
    model: PreTrainedModel, identity: Identity, tokens: Tensor, share: Share, ranks: Ranks, track: Track
) -> Statistics:
    """Record this process's share, and on rank 0 add up the shares of all ranks.

    Args:
        model: the dense model.
        identity: of the whole recording.
        tokens: the whole text, ``[sequences, length]``.
        share: what to record here, and where to keep it.
        ranks: the processes at work. `share` must be the whole where there are several.
        track: shows progress.

    Returns:
        The recording: all of it on rank 0, or this process's share only.

    Raises:
        FfnskipError: the file is of another recording, or the model computes infinities.
    """
    whole = share
    share = share.of_rank(ranks)
    statistics = _begin(identity, share)
    _record_share(model, statistics, tokens, share, track)
    if ranks.size > 1:
        for tensor in (statistics.record.sequences, statistics.record.similarities, statistics.done):
            ranks.add_up(tensor)
        if ranks.rank == 0 and whole.path is not None:
            statistics.save(whole.path)
    if ranks.rank == 0 and not statistics.record.similarities.isfinite().all():
        raise FfnskipError("The model's activations are not finite numbers: try another --dtype, such as float32.")
    return statistics


def _begin(identity: Identity, share: Share) -> Statistics:
    if share.path is None or not share.path.exists() or not share.resume:
        return Statistics(identity)
    found = load_statistics([share.path])
    refuse_difference(identity, found.identity, "what --resume was asked for", str(share.path))
    return found


def _record_share(model: PreTrainedModel, statistics: Statistics, tokens: Tensor, share: Share, track: Track) -> None:
    on = statistics.identity.text.on
    todo = [places for places in blocks_of(share, len(tokens), on) if not statistics.done[places].all()]
    what = "recording similarities" if on == "text" else "generating and recording similarities"
    saved_at = time.monotonic()
    try:
        for places in track(todo, what, len(todo)):
            statistics.put(places, record_block(model, tokens[places].long(), on))
            if share.path is not None and time.monotonic() - saved_at > SECONDS_BETWEEN_SAVES:
                statistics.save(share.path)
                saved_at = time.monotonic()
    finally:
        if share.path is not None:
            statistics.save(share.path)


def _fingerprint(model: PreTrainedModel) -> str:
    """Hash over elements at even distances of every weight: a model trained further has another one."""
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        if weight.device.type != "meta":  # accelerate keeps what does not fit elsewhere
            flat = weight.detach().flatten()
            digest.update(flat[:: max(1, len(flat) // _SAMPLE)].double().cpu().numpy().tobytes())
    return digest.hexdigest()
