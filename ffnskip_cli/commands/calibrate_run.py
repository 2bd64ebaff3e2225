"""One run of `ffnskip calibrate`: its files, and its way from a loaded model to profiles."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from ffnskip_cli import console
from ffnskip_cli.commands import options
from ffnskip_cli.commands.calibrate_output import Format, announce, refuse_unwritable, warn_of_shortfall, write

if TYPE_CHECKING:
    from torch import Tensor

    from ffnskip.profiles.profile import Profile
    from ffnskip_cli.calibration.lab import Step
    from ffnskip_cli.calibration.pipeline import Pipeline
    from ffnskip_cli.calibration.recording.collect import Share
    from ffnskip_cli.calibration.recording.file import Identity, Source, Statistics
    from ffnskip_cli.calibration.recording.ranks import Ranks
    from ffnskip_cli.calibration.settings import Goal, Settings
    from ffnskip_cli.journal import Journal
    from ffnskip_cli.sources.models import LoadedModel
    from ffnskip_cli.text.corpus import Corpus


@dataclass(frozen=True)
class Files:
    """What is read and written."""

    profiles: dict[Goal, Path]
    plot: Path | None
    stats_out: Path | None
    stats_in: list[Path]
    resume: bool
    dry_run: bool

    def check(self, shard: tuple[int, int] | None) -> None:
        """Refuse what does not go together, and what cannot be written, before anything long begins."""
        from ffnskip.errors import FfnskipError
        from ffnskip_cli.calibration.recording.collect import kept_files
        from ffnskip_cli.report.plot import plot_kind

        written = [path.resolve() for path in (*self.profiles.values(), self.plot, self.stats_out) if path]
        for path in written:
            if [*written, *(path.resolve() for path in self.stats_in)].count(path) > 1:
                raise FfnskipError(f"{path.name} would be written over: give every file a name of its own.")
        if self.resume and self.stats_out is None:
            raise FfnskipError("--resume needs the --stats-out file to go on with.")
        if shard is not None and (self.stats_out is None or self.stats_in):
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
            if shard is not None:
                raise FfnskipError("--shard only records: draw the profile when you solve.")
            if len(self.profiles) != 1:
                raise FfnskipError("--plot draws one profile: draw several with ffnskip inspect PROFILE --plot FILE.")
            refuse_unwritable(self.plot, "--plot")
            plot_kind(self.plot)

    def share(self, shard: tuple[int, int] | None) -> Share:
        """What this process records, and where it keeps it."""
        from ffnskip_cli.calibration.recording.collect import Share

        index, count = (0, 1) if shard is None else shard
        return Share(index, count, self.stats_out, self.resume, only_records=shard is not None)

    def journal(self, subject: object) -> Journal:
        """Beside the recording, if there is one to resume."""
        from ffnskip_cli.journal import Journal

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


@dataclass(frozen=True)
class Run:
    """One calibration of a loaded model."""

    name: str
    loaded: LoadedModel
    settings: Settings
    files: Files
    datasets: list[str]
    eval_datasets: list[str]
    offline: bool

    def start(self, recorded: Statistics | None, share: Share, ranks: Ranks, format: Format) -> None:
        """Record, or take what was recorded, then solve and write, as far as this process is to go."""
        from ffnskip_cli.calibration.lab import Lab, Sizes
        from ffnskip_cli.calibration.pipeline import Pipeline
        from ffnskip_cli.calibration.recording.collect import source_of
        from ffnskip_cli.calibration.recording.file import refuse_difference

        source = source_of(self.loaded)
        self.settings.refuse_region(source.model.n_layers)
        if recorded is not None:
            known = recorded.identity.source.facts()
            refuse_difference(source.facts(), known, "the model", str(self.files.stats_in[0]))
        identity, tokens, held_out, fit_text = self._texts(source, recorded)
        blocks = [] if recorded else share.blocks(ranks, len(tokens), identity.text.on)
        left = sum(map(len, blocks))
        pipeline = Pipeline(self.settings)
        steps = pipeline.cost(Sizes.of(self.settings, left, len(held_out.tokens)))
        if self.files.dry_run:
            if ranks.rank == 0:
                self._forecast(steps, tokens, format)
            return
        announce(steps)
        with self.files.resumable():
            lab = Lab(self.loaded.model, console.track)
            statistics = recorded or pipeline.record.run(lab, identity, tokens, share, ranks)
            if ranks.rank > 0:
                return
            if share.only_records:
                self._say_recorded(statistics, share)
            else:
                self._solve(pipeline, statistics, held_out, fit_text, format)

    def _texts(self, source: Source, recorded: Statistics | None) -> tuple[Identity, Tensor, Corpus, Corpus | None]:
        """The calibration text with its identity, the held-out text, and the text to fit to if there is a fit."""
        from ffnskip_cli.calibration.recording.collect import identity_of
        from ffnskip_cli.calibration.texts import (
            held_out_of,
            refuse_other_texts,
            text_to_fit,
            text_to_record,
        )
        from ffnskip_cli.text.named import text_names

        loaded, settings, offline, datasets = self.loaded, self.settings, self.offline, self.datasets
        fit_text = None
        with console.busy("Preparing text"):
            if recorded is None:
                text = text_to_record(loaded, datasets, settings, offline)
                warn_of_shortfall("calibration", text)
                identity, tokens = identity_of(source, text, settings), text.tokens
            else:
                identity, tokens = recorded.identity, recorded.record.sequences
                if datasets:
                    refuse_other_texts(identity, datasets, offline)
            used = identity.documents
            if settings.fits and settings.goals:
                names = datasets or text_names(identity.text)
                fit_text = text_to_fit(loaded, names, settings, offline, used)
                warn_of_shortfall("fitting", fit_text)
                if used & fit_text.document_hashes:
                    console.warn(
                        "The text is too short to keep what is fitted to apart from what the threshold is solved on: "
                        "the ratio will be lower on unseen text."
                    )
                used |= fit_text.document_hashes
            held_out = held_out_of(loaded, identity, datasets, self.eval_datasets, settings, offline, used)
        warn_of_shortfall("evaluation", held_out)
        return identity, tokens, held_out, fit_text

    def _forecast(self, steps: list[Step], tokens: Tensor, format: Format) -> None:
        from ffnskip_cli.calibration.forecast import memory_bytes, seconds
        from ffnskip_cli.report.forecast import print_forecast

        with console.busy("Timing a few forward passes"):
            times = seconds(self.loaded.model, tokens, steps)
        memory = memory_bytes(self.loaded.model, self.settings)
        print_forecast(steps, times, memory, self.settings.sequence_length, format)

    def _say_recorded(self, statistics: Statistics, share: Share) -> None:
        done = len(statistics.done) - statistics.missing
        console.talk.print(f"Recorded {done} of {len(statistics.done)} sequences in {share.path}.", markup=False)
        console.hint("With all parts recorded, solve them: ffnskip calibrate MODEL --target … --stats-in PART1 …")

    def _solve(
        self, pipeline: Pipeline, statistics: Statistics, held_out: Corpus, fit_text: Corpus | None, format: Format
    ) -> None:
        from ffnskip.errors import FfnskipError
        from ffnskip_cli.calibration.lab import Lab

        if statistics.missing:
            raise FfnskipError(
                f"The recording lacks {statistics.missing} of {len(statistics.done)} sequences: name the files of the "
                "other parts with --stats-in, too."
            )
        if self.files.stats_in and self.files.stats_out is not None:
            self._refuse_to_replace_another(self.files.stats_out, statistics)
            statistics.save(self.files.stats_out)
        journal = self.files.journal(
            [statistics.identity.facts(), str(self.loaded.model.device), *map(version, ("torch", "ffnskip"))]
        )
        result = pipeline.compile(Lab(self.loaded.model, console.track, journal), statistics, held_out, fit_text)
        if result.finished:
            written = write(result.finished, self.files.profiles, format)
            self._plot(result.finished[0].profile)
            options.hint_command("bench", self.name, "--profile", written[0])
        journal.discard()
        if result.refused:
            raise FfnskipError(" ".join(result.refused))

    def _refuse_to_replace_another(self, path: Path, statistics: Statistics) -> None:
        from ffnskip_cli.calibration.recording.file import load_statistics, refuse_difference

        if path.exists():
            found = load_statistics([path]).identity.facts()
            refuse_difference(statistics.identity.facts(), found, "--stats-in", str(path))

    def _plot(self, profile: Profile) -> None:
        if self.files.plot is not None:
            from ffnskip_cli.report.plot import plot_profile

            plot_profile(profile, self.files.plot)
            console.talk.print(f"Wrote {self.files.plot}.", markup=False)
