"""The files of `ffnskip calibrate`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ffnskip.errors import FfnskipError
from ffnskip_cli import console
from ffnskip_cli.calibration.recording.collect import Share, kept_files
from ffnskip_cli.calibration.settings import Goal
from ffnskip_cli.commands.options import refuse_unwritable
from ffnskip_cli.progress import Journal
from ffnskip_cli.report.plot import plot_kind


@dataclass(frozen=True)
class Files:
    """What is read and written."""

    profiles: dict[Goal, Path]
    plot: Path | None
    stats_out: Path | None
    stats_in: list[Path]
    resume: bool
    dry_run: bool
    shard: tuple[int, int] | None = None

    def check(self) -> None:
        """Refuse what does not go together, and what cannot be written, before anything long begins."""
        written = [path.resolve() for path in (*self.profiles.values(), self.plot, self.stats_out) if path]
        for path in written:
            if [*written, *(path.resolve() for path in self.stats_in)].count(path) > 1:
                raise FfnskipError(f"{path.name} would be written over: give every file a name of its own.")
        if self.resume and self.stats_out is None:
            raise FfnskipError("--resume needs the --stats-out file to go on with.")
        if self.shard is not None and (self.stats_out is None or self.stats_in):
            raise FfnskipError("--shard records to a file of its own: give it --stats-out, and no --stats-in.")
        if self.stats_out is not None:
            refuse_unwritable(self.stats_out, "--stats-out")
            refuse_unwritable(self.journal_path, "--stats-out")
            kept = kept_files(self.stats_out)
            if self.resume and not kept:
                console.talk.print(f"There is no {self.stats_out} to go on with yet: starting anew.", markup=False)
            if kept and not (self.resume or self.dry_run):
                raise FfnskipError(
                    f"{kept[0]} is there already: go on with it by --resume, solve it by --stats-in, or name "
                    "another --stats-out."
                )
        if self.plot is not None:
            if self.shard is not None:
                raise FfnskipError("--shard only records: draw the profile when you solve.")
            if len(self.profiles) != 1:
                raise FfnskipError("--plot draws one profile: draw several with ffnskip inspect PROFILE --plot FILE.")
            refuse_unwritable(self.plot, "--plot")
            plot_kind(self.plot)

    def share(self) -> Share:
        """What this process records, and where it keeps it."""
        index, count = self.shard or (0, 1)
        return Share(index, count, self.stats_out, self.resume, only_records=self.shard is not None)

    def journal(self, subject: object) -> Journal:
        """Beside the recording, if there is one to resume."""
        return Journal(self.journal_path if self.stats_out else None, subject, resume=self.resume)

    @property
    def journal_path(self) -> Path:
        """Where a run with --stats-out keeps what it has measured."""
        assert self.stats_out is not None
        return self.stats_out.with_name(f"{self.stats_out.name}.journal")

    @contextmanager
    def resumable(self) -> Iterator[None]:
        """Say how to go on after Ctrl-C."""
        try:
            yield
        except KeyboardInterrupt:
            if self.stats_out is not None:
                console.hint("What is finished is kept: the same command with --resume goes on from there.")
            raise
