"""Record a whole text, or this machine's share of it, and survive being killed.

Of several processes, as `torchrun` starts them, each loads the model and records its share of the text. Their shares
are added up once, on rank 0, which goes on alone.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ffnskip.errors import FfnskipError
from ffnskip.profiles.identity import model_info
from ffnskip_cli.calibration import assemble
from ffnskip_cli.calibration.lab import Lab, Sizes, Step
from ffnskip_cli.calibration.recording.file import Identity, Source, Statistics, load_statistics, refuse_difference
from ffnskip_cli.calibration.recording.record import BLOCK, Record, record_block
from ffnskip_cli.calibration.settings import GENERATED_TOKENS, On, Settings

if TYPE_CHECKING:
    from ffnskip_cli.sources.models import LoadedModel
    from ffnskip_cli.text.corpus import Corpus

T = TypeVar("T")
_PATIENCE = timedelta(days=7)  # the others wait for the slowest rank, however slow it is
SECONDS_BETWEEN_SAVES = 20.0  # what a kill can cost, besides the block at work


@dataclass(frozen=True)
class Ranks:
    """This process among those that share the work."""

    rank: int = 0
    size: int = 1

    def add_up(self, tensor: Tensor) -> None:
        """Replace the tensor of rank 0 by the sum over all ranks, in place; those of the others are undefined."""
        if self.size > 1:
            dist.reduce(tensor, dst=0)

    def gather(self, facts: T) -> list[T]:
        """The facts of every rank, on every rank."""
        if self.size == 1:
            return [facts]
        everybody: list[T] = [facts] * self.size
        dist.all_gather_object(everybody, facts)
        return everybody

    def wait(self) -> None:
        """Go on when all ranks have come here."""
        if self.size > 1:
            dist.barrier()


@contextmanager
def join_ranks() -> Iterator[Ranks]:
    """Meet the other processes that `torchrun` started, if it started this one."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "MASTER_ADDR" not in os.environ:
        yield Ranks()
        return
    # On the CPU, whatever the model runs on: what is added up lies in main memory, and only once.
    dist.init_process_group("gloo", timeout=_PATIENCE)
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


@dataclass(frozen=True)
class Share:
    """Which blocks of the text this process records, and where it keeps them.

    Attributes:
        index, count: this is share `index`, from 0, of `count`.
        path: the statistics file of all processes together; None to keep nothing on disk.
        resume: go on with what was kept.
        only_records: whether the run ends with the recording.
    """

    index: int = 0
    count: int = 1
    path: Path | None = None
    resume: bool = False
    only_records: bool = False

    def blocks(self, ranks: Ranks, sequences: int, on: On) -> list[Tensor]:
        """The places of the sequences that one rank records, in blocks that are recorded together."""
        blocks = torch.arange(sequences).split(BLOCK[on])
        return list(blocks[self.index + self.count * ranks.rank :: self.count * ranks.size])

    def file_of(self, ranks: Ranks) -> Path | None:
        """Where one rank keeps what it records, until all are added up."""
        if self.path is None or ranks.size == 1:
            return self.path
        return self.path.with_name(f"{self.path.name}.{ranks.rank + 1}-of-{ranks.size}")


def kept_files(path: Path) -> list[Path]:
    """What an earlier run, of however many ranks, has left of a recording."""
    whole = [path] if path.exists() else []
    return whole + sorted(path.parent.glob(f"{glob.escape(path.name)}.*-of-*"))


def source_of(loaded: LoadedModel) -> Source:
    """What identifies the model and tokenizer at hand."""
    model = loaded.model
    backend = getattr(loaded.tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend else json.dumps(loaded.tokenizer.get_vocab(), sort_keys=True)
    return Source(
        model_info(model, id=loaded.id, revision=loaded.revision, gguf_sha256=loaded.gguf_sha256),
        tokenizer_sha256=hashlib.sha256(rules.encode()).hexdigest(),
        dtype=str(model.dtype).removeprefix("torch."),
    )


def identity_of(source: Source, text: Corpus, settings: Settings) -> Identity:
    """What a recording of `text` depends on."""
    tokens = hashlib.sha256(text.tokens.to(torch.int32).numpy().tobytes()).hexdigest()
    return Identity(source, assemble.calibration_text(text, settings, source.dtype), text.document_hashes, tokens)


@dataclass(frozen=True)
class RecordStage:
    """Record the similarities of the whole calibration text, or of this process's share of it."""

    settings: Settings

    def run(self, lab: Lab, identity: Identity, tokens: Tensor, share: Share, ranks: Ranks) -> Statistics:
        """See `collect`."""
        return collect(lab, identity, tokens, share, ranks)

    def cost(self, sizes: Sizes) -> list[Step]:
        """One pass for each sequence, or the steps that generate so many tokens."""
        if self.settings.on == "text":
            return [Step("record similarities", sizes.to_record)]
        blocks = -(-sizes.to_record // BLOCK["generated"])
        return [Step("generate and record similarities", 0, blocks * (GENERATED_TOKENS + 1))]


def collect(lab: Lab, identity: Identity, tokens: Tensor, share: Share, ranks: Ranks) -> Statistics:
    """Record this process's share, and on rank 0 add up what all ranks recorded.

    Args:
        lab: with the dense model.
        identity: of the whole recording.
        tokens: the whole text, ``[sequences, length]``.
        share: what all ranks together are to record, and where to keep it.
        ranks: the processes at work.

    Returns:
        The recording: the whole share on rank 0.

    Raises:
        FfnskipError: a file or another rank is at another recording, or the model computes infinities.
    """
    for rank, facts in enumerate(ranks.gather(identity.facts())):
        refuse_difference(identity.facts(), facts, f"rank {ranks.rank}", f"rank {rank}")
    statistics = Statistics(identity)
    blocks, file = share.blocks(ranks, len(tokens), identity.text.on), share.file_of(ranks)
    if share.resume and share.path is not None:
        _take_over(statistics, kept_files(share.path), blocks)
    _record(lab, statistics, tokens, blocks, file)
    if ranks.size > 1:
        _add_up(statistics, share, ranks)
    if ranks.rank == 0 and not statistics.record.values.isfinite().all():
        raise FfnskipError("The model's activations are not finite numbers: try another --dtype, such as float32.")
    return statistics


def _take_over(statistics: Statistics, files: list[Path], blocks: list[Tensor]) -> None:
    """Fill in what files hold of our own blocks; the others record or take over theirs."""
    ours = torch.zeros_like(statistics.done)
    for places in blocks:
        ours[places] = 1
    for path in files:
        found = load_statistics([path])
        refuse_difference(statistics.identity.facts(), found.identity.facts(), "what --resume was asked for", str(path))
        places = (found.done * ours * (1 - statistics.done)).nonzero().squeeze(1)
        statistics.put(places, Record(found.record.sequences[places], found.record.values[places]))


def _record(lab: Lab, statistics: Statistics, tokens: Tensor, blocks: list[Tensor], file: Path | None) -> None:
    on = statistics.identity.text.on
    todo = [places for places in blocks if not statistics.done[places].all()]
    what = "recording similarities" if on == "text" else "generating and recording similarities"
    saved_at = time.monotonic()
    try:
        for places in lab.track(todo, what, len(todo)):
            statistics.put(places, record_block(lab.model, tokens[places].long(), on))
            if file is not None and time.monotonic() - saved_at > SECONDS_BETWEEN_SAVES:
                statistics.save(file)
                saved_at = time.monotonic()
    finally:
        if file is not None:
            statistics.save(file)


def _add_up(statistics: Statistics, share: Share, ranks: Ranks) -> None:
    """On rank 0, and then the files of the single ranks are not needed any more."""
    for tensor in (statistics.record.sequences, statistics.record.values, statistics.done):
        ranks.add_up(tensor)
    if share.path is None:
        return
    if ranks.rank == 0:
        statistics.save(share.path)
    ranks.wait()
    if (file := share.file_of(ranks)) is not None:
        file.unlink(missing_ok=True)
