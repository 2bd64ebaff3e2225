"""One run of `ffnskip calibrate`: its files, and its way from a loaded model to profiles."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ffnskip.errors import FfnskipError
from ffnskip.profiles.profile import Profile, save_profile
from ffnskip_cli import console
from ffnskip_cli.calibration.assemble import Calibrated, evaluation_text
from ffnskip_cli.calibration.lab import Lab, Sizes, Step
from ffnskip_cli.calibration.pipeline import Pipeline
from ffnskip_cli.calibration.recording.collect import Ranks, Share, identity_of, join_ranks, source_of
from ffnskip_cli.calibration.recording.file import Identity, Source, Statistics, load_statistics, refuse_difference
from ffnskip_cli.calibration.settings import Goal, Settings
from ffnskip_cli.calibration.texts import held_out_of, refuse_other_texts, text_to_fit, text_to_record
from ffnskip_cli.calibration.threshold.solve import PROMISED
from ffnskip_cli.commands import common, loading
from ffnskip_cli.commands.calibrate import Options
from ffnskip_cli.commands.calibrate_files import Files
from ffnskip_cli.commands.options import Format
from ffnskip_cli.report.calibration import print_forecast, print_profiles
from ffnskip_cli.report.plot import plot_profile
from ffnskip_cli.report.words import kinds_of, text_name
from ffnskip_cli.sources.models import LoadedModel
from ffnskip_cli.text.corpus import Corpus
from ffnskip_cli.text.named import check_names, text_names

if TYPE_CHECKING:
    from torch import Tensor


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
        common.announce(steps)
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
        loaded, settings, offline, datasets = self.loaded, self.settings, self.offline, self.datasets
        fit_text = None
        with console.busy("Preparing text"):
            if recorded is None:
                text = text_to_record(loaded, datasets, settings, offline)
                common.warn_of_shortfall("calibration", evaluation_text(text))
                identity, tokens = identity_of(source, text, settings), text.tokens
            else:
                identity, tokens = recorded.identity, recorded.record.sequences
                if datasets:
                    refuse_other_texts(identity, datasets, offline)
            used = identity.documents
            if settings.fits and settings.goals:
                names = datasets or text_names(identity.text)
                fit_text = text_to_fit(loaded, names, settings, offline, used)
                common.warn_of_shortfall("fitting", evaluation_text(fit_text))
                if used & fit_text.document_hashes:
                    console.warn(
                        "The text is too short to keep what is fitted to apart from what the threshold is solved on: "
                        "the ratio will be lower on unseen text."
                    )
                used |= fit_text.document_hashes
            held_out = held_out_of(loaded, identity, datasets, self.eval_datasets, settings, offline, used)
        common.warn_of_shortfall("evaluation", evaluation_text(held_out))
        return identity, tokens, held_out, fit_text

    def _forecast(self, steps: list[Step], tokens: Tensor, format: Format) -> None:
        with console.busy("Timing a few forward passes"):
            times = Lab(self.loaded.model).seconds(tokens, steps)
        memory = Pipeline(self.settings).memory(self.loaded.model)
        print_forecast(steps, times, memory, self.settings.sequence_length, format)

    def _say_recorded(self, statistics: Statistics, share: Share) -> None:
        done = len(statistics.done) - statistics.missing
        console.talk.print(f"Recorded {done} of {len(statistics.done)} sequences in {share.path}.", markup=False)
        console.hint("With all parts recorded, solve them: ffnskip calibrate MODEL --target … --stats-in PART1 …")

    def _solve(
        self, pipeline: Pipeline, statistics: Statistics, held_out: Corpus, fit_text: Corpus | None, format: Format
    ) -> None:
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
            common.hint_command("bench", self.name, "--profile", written[0])
        if result.refused:  # with --resume another goal needs no other fit
            raise FfnskipError(" ".join(result.refused))
        journal.discard()

    def _refuse_to_replace_another(self, path: Path, statistics: Statistics) -> None:
        if path.exists():
            found = load_statistics([path]).identity.facts()
            refuse_difference(statistics.identity.facts(), found, "--stats-in", str(path))

    def _plot(self, profile: Profile) -> None:
        if self.files.plot is not None:
            plot_profile(profile, self.files.plot)
            console.talk.print(f"Wrote {self.files.plot}.", markup=False)


def run(options: Options) -> None:
    """Check the options, load the model and write a profile for each goal."""
    paths, named = options.paths(), options.named
    name, choices, offline = options.model, options.settings.keywords, options.model_options.offline
    files = Files(
        paths,
        options.plot,
        options.stats_out,
        options.stats_in or [],
        options.resume,
        options.dry_run,
        options.shard,
    )
    if "candidates" in named and choices["candidates"] and choices["rule"] != "cosine":
        rule = choices["rule"]
        raise FfnskipError(f"--candidates belongs to --rule cosine: with {rule} there is no region to search.")
    files.check()
    statistics = load_statistics(files.stats_in) if files.stats_in else None
    settings = options.settings(goals=(*paths,), **_as_recorded(statistics, choices, named))
    usual = [] if statistics else ["demo" if name == "demo" else "wikitext"]
    datasets, eval_datasets = options.dataset or usual, options.eval_dataset or []
    for names in (datasets, eval_datasets):
        check_names(names, offline)
    with join_ranks() as ranks:
        if ranks.rank > 0:
            console.mute()
        loaded = loading.load(name, options.model_options, settings.rule, profiled=False)
        common.refuse_longer(loaded.model, settings.sequence_length, "lower --sequence-length")
        calibration = Run(name, loaded, settings, files, datasets, eval_datasets, offline)
        calibration.start(statistics, files.share(), ranks, options.format)


def _as_recorded(statistics: Statistics | None, choices: dict[str, Any], named: Set[str]) -> dict[str, Any]:
    """The settings of the recording, if there is one; raises FfnskipError if an option names another one."""
    if statistics is None:
        return {}
    text = statistics.identity.text
    recorded = {
        "on": text.on,
        "tokens": text.tokens_requested,
        "sequence_length": text.sequence_length,
        "seed": text.seed,
    }
    for name, value in recorded.items():
        if name in named and choices[name] != value:
            option = name.replace("_", "-")
            raise FfnskipError(f"The recording was made with --{option} {value}: leave --{option} out.")
    return recorded


def write(finished: list[Calibrated], path_of: dict[Goal, Path], format: Format) -> list[Path]:
    """Save the profiles, print what they hold, and return where they are."""
    paths = [path_of[calibrated.goal] for calibrated in finished]
    for calibrated, path in zip(finished, paths, strict=True):
        save_profile(calibrated.profile, path)
        console.talk.print(f"Wrote {path}.", markup=False)
    print_profiles(finished, paths, format)
    for calibrated, path in zip(finished, paths, strict=True):
        _say_if_off_target(calibrated, path)
        common.warn_if_over_budget(calibrated.profile, path)
    return paths


def _say_if_off_target(calibrated: Calibrated, path: Path) -> None:
    """The threshold is verified on the calibration text; on held-out text the ratio is another one."""
    profile = calibrated.profile
    found, text, held_out = profile.measured, profile.calibration, profile.evaluation
    assert found is not None
    assert text is not None
    assert held_out is not None
    error = found.standard_error["skip_ratio"]
    moved = f"{path} skips {found.skip_ratio:.3f} ± {error:.3f} of the FFNs on {text_name(held_out)}"
    if kinds_of(held_out) != kinds_of(text):
        console.talk.print(
            f"{moved}, and {calibrated.calibration_ratio:.3f} on {text_name(text)}, which it was calibrated on. That "
            f"the ratio moves is the rule at work: the threshold is on {profile.skip.by.decides_by}, not on how many "
            "are skipped, so text in which the FFNs have less to do skips more, and other text less.",
            markup=False,
        )
    elif found.target_ratio is not None and abs(found.skip_ratio - found.target_ratio) > PROMISED:
        console.warn(
            f"{moved}, not {found.target_ratio:g}: the unseen part of the text is unlike the part that was "
            "calibrated on, or too short to tell; more --tokens and --eval-tokens bring the two closer."
        )
