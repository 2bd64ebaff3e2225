"""`ffnskip compare-text`, and the comparison behind it."""

import csv
import hashlib
import io
import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.image import imread
from support.calibrations import paper_settings
from support.cli import mistake, succeed, talk
from support.factories import make_profile
from support.pico import pico_model, pico_source, pico_tokens

from ffnskip import FfnskipError
from ffnskip.profiles.profile import Profile
from ffnskip.stats import SkipStats
from ffnskip_cli.calibration.compare import (
    ComparedText,
    Comparison,
    beyond_noise,
    build_texts,
    check_texts,
    compare,
)
from ffnskip_cli.calibration.lab import Lab
from ffnskip_cli.calibration.pipeline import Pipeline
from ffnskip_cli.calibration.recording.collect import Share, collect, identity_of
from ffnskip_cli.calibration.recording.ranks import Ranks
from ffnskip_cli.calibration.rules.cosine.compiler import CosineCompiler
from ffnskip_cli.calibration.settings import Goal
from ffnskip_cli.calibration.threshold.verify import GOOD_ENOUGH
from ffnskip_cli.measure.quality import Estimate, Quality, measure_quality
from ffnskip_cli.report.compare_words import answer
from ffnskip_cli.report.heat_map import plot_comparison
from ffnskip_cli.sources.models import load_model
from ffnskip_cli.text.corpus import Corpus
from ffnskip_cli.text.sources import open_text
from ffnskip_cli.track import silently

LENGTH, WARM_UP, TARGET = 24, 3, 0.1
SETTINGS = paper_settings(
    Goal("target_ratio", TARGET),
    tokens=12 * LENGTH,
    sequence_length=LENGTH,
    warm_up=WARM_UP,
    window=None,
    refresh_every=None,
    candidates=0,
)
SMALL = ("--tokens", 1024, "--eval-tokens", 512, "--sequence-length", 64, "--warm-up", 4)


def corpus(seed: int, sequences: int, highest: int) -> Corpus:
    """Random tokens, all of them small numbers where `highest` is small."""
    tokens = pico_tokens(LENGTH, batch=sequences, seed=seed) % highest + 3
    return Corpus(tokens, "ab" * 32, tokens.numel(), frozenset(), f"text-{highest}", None, None, None)


@pytest.fixture(scope="module")
def texts() -> list[ComparedText]:
    return [
        ComparedText(f"of {highest}", corpus(highest, 12, highest), corpus(highest + 1, 4, highest))
        for highest in (4, 90)
    ]


@pytest.fixture(scope="module")
def comparison(texts: list[ComparedText]) -> Comparison:
    model = pico_model(dtype=torch.float64)
    return compare(model, pico_source(model), texts, SETTINGS, silently)


def test_each_profile_has_the_target_ratio_on_the_text_it_was_calibrated_on(comparison: Comparison) -> None:
    assert comparison.calibration_ratios == pytest.approx((TARGET, TARGET), abs=GOOD_ENOUGH)
    assert [profile.calibration and profile.calibration.dataset for profile in comparison.profiles] == [
        "text-4",
        "text-90",
    ]


def test_the_diagonal_is_what_calibrate_writes_into_a_profile(
    comparison: Comparison, texts: list[ComparedText]
) -> None:
    model = pico_model(dtype=torch.float64)
    for index, text in enumerate(texts):
        identity = identity_of(pico_source(model), text.calibration, SETTINGS)
        statistics = collect(Lab(model), identity, text.calibration.tokens, Share(), Ranks())
        (calibrated,) = Pipeline(SETTINGS).compile(Lab(model), statistics, text.held_out).finished
        assert calibrated.profile.skip == comparison.profiles[index].skip
        quality, measured = comparison.measured[index][index], calibrated.profile.measured
        assert measured
        for figure in ("skip_ratio", "kl", "perplexity_dense", "perplexity"):
            assert getattr(quality, figure).mean == pytest.approx(getattr(measured, figure), rel=1e-4)


def test_off_the_diagonal_a_profile_is_measured_on_the_other_text(
    comparison: Comparison, texts: list[ComparedText]
) -> None:
    model = pico_model(dtype=torch.float64)
    for row, column in ((0, 1), (1, 0)):
        (alone,) = measure_quality(model, [comparison.profiles[row]], texts[column].held_out.tokens, silently)
        assert comparison.measured[row][column] == alone
    assert comparison.foreign == [(0, 1), (1, 0)]


def test_profiles_with_different_warm_ups_are_measured_at_the_same_positions(
    texts: list[ComparedText], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, warm_ups = pico_model(dtype=torch.float64), iter((2, 7))

    def choose(compiler: CosineCompiler, *arguments: Any) -> Profile:
        draft = real(compiler, *arguments)
        return draft.model_copy(update={"skip": draft.skip.model_copy(update={"warm_up": next(warm_ups)})})

    real = CosineCompiler.choose
    monkeypatch.setattr(CosineCompiler, "choose", choose)
    found = compare(model, pico_source(model), texts, SETTINGS, silently)
    assert [profile.skip.warm_up for profile in found.profiles] == [2, 7]
    for (one, other), text in zip(zip(*found.measured, strict=True), texts, strict=True):
        assert one.nll_dense == other.nll_dense
        assert one.tokens == len(text.held_out.tokens) * (LENGTH - 1 - 7)


def test_a_text_that_cannot_be_calibrated_on_is_named(texts: list[ComparedText]) -> None:
    model = pico_model(dtype=torch.float64)
    impossible = paper_settings(Goal("target_ratio", 0.9), sequence_length=LENGTH, warm_up=WARM_UP, candidates=0)
    with pytest.raises(FfnskipError, match=r"^Calibrating on of 4: A skip ratio of 0\.9 cannot be reached"):
        compare(model, pico_source(model), texts, impossible, silently)


def test_no_held_out_document_was_calibrated_on_in_any_of_the_texts(
    pico_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "own.txt"
    draw = random.Random(0)
    path.write_text("\n\n".join("".join(draw.choices("abcdefgh ", k=2100)) for _ in range(64)))
    own_words = list(open_text(str(path)).documents())

    def sample(model: object, tokenizer: object, seed: str) -> Iterator[str]:
        """The model happens to write the file's documents, half of them where it is calibrated on."""
        yield from own_words[:32] if "calibration" in seed else own_words[16:]

    for module in ("calibration.compare", "text.named"):
        monkeypatch.setattr(f"ffnskip_cli.{module}.sample_documents", sample)
    settings = paper_settings(*SETTINGS.goals, tokens=40_000, eval_tokens=4000, sequence_length=32, warm_up=2)
    texts = build_texts(load_model(str(pico_folder)), [str(path), "self"], settings, offline=True)
    assert [text.name for text in texts] == ["own.txt", "self"]
    held_out_by_content = {digest for digest in map(sha256_of, own_words) if digest[0] % 8 == 0}
    assert texts[1].calibration.document_hashes & held_out_by_content
    for text in texts:
        assert text.held_out.tokens_used > 0
        for other in texts:
            assert text.held_out.document_hashes.isdisjoint(other.calibration.document_hashes)


def sha256_of(document: str) -> bytes:
    return hashlib.sha256(document.encode()).digest()


def invented(ratios: list[list[float]], kls: list[list[float]], windows: tuple[int | None, ...]) -> Comparison:
    """Two texts with four sequences each, whose KL varies a little from sequence to sequence."""
    wiggle = (-0.002, 0.001, 0.002, -0.001)

    def quality(ratio: float, kl: float) -> Quality:
        nothing = Estimate(0.0, 0.0)
        by_sequence = tuple(kl + part * kl for part in wiggle)
        stats = SkipStats(6)
        return Quality(
            4, 80, nothing, nothing, Estimate(kl, 0.001), nothing, Estimate(ratio, 0.002), stats, by_sequence
        )

    return Comparison(
        0.1,
        tuple(ComparedText(name, corpus(0, 4, 9), corpus(1, 4, 9)) for name in ("wiki", "maths")),
        tuple(make_profile(window=window) for window in windows),
        (0.1, 0.1),
        tuple(
            tuple(quality(ratio, kl) for ratio, kl in zip(*row, strict=True)) for row in zip(ratios, kls, strict=True)
        ),
    )


def test_kl_is_compared_with_the_own_profiles_sequence_by_sequence() -> None:
    found = invented([[0.1, 0.2], [0.05, 0.1]], [[1.0, 3.0], [0.4, 1.0]], (None, None))
    difference = found.kl_difference(0, 1)
    assert difference.mean == pytest.approx(2.0)
    spread = torch.tensor((-0.002, 0.001, 0.002, -0.001), dtype=torch.float64) * 2.0
    assert difference.standard_error == pytest.approx(float(spread.std()) / 2)
    assert beyond_noise(difference)
    equal = found.kl_difference_at_equal_ratio(0, 1)
    assert equal
    assert equal.mean == pytest.approx(3.0 * 0.1 / 0.2 - 1.0)
    assert found.ratio_difference(0, 1) == pytest.approx(0.1)


def test_a_profile_that_skips_nothing_has_no_kl_at_the_ratio_of_another() -> None:
    found = invented([[0.1, 0.0], [0.1, 0.1]], [[1.0, 0.0], [1.0, 1.0]], (None, 1))
    assert found.kl_difference_at_equal_ratio(0, 1) is None


def test_with_one_rule_the_answer_says_that_a_difference_is_one_of_the_threshold() -> None:
    spread, ratio, kl, why = answer(invented([[0.1, 0.2], [0.05, 0.1]], [[1.0, 3.0], [0.4, 1.0]], (None, None)))
    assert spread == (
        "Calibrated for a ratio of 0.1, the profiles skip 0.100 of the FFNs on unseen text of their own kind, and "
        "0.050 to 0.200 on the other texts."
    )
    assert ratio == (
        "A profile calibrated elsewhere is up to 0.100 away from the ratio of the text's own profile: that of wiki "
        "skips 0.200 ± 0.002 on maths, where that of maths skips 0.100 ± 0.002."
    )
    assert kl == (
        "Its KL differs from that of the text's own profile beyond two standard errors in 2 of 2 cases (1 higher, 1 "
        "lower): at most, that of wiki costs 3.000 ± 0.001 nats per token on maths at ratio 0.200, where that of maths "
        "costs 1.000 ± 0.001 at 0.100."
    )
    assert why.startswith("All profiles have the same rule and differ in the threshold alone, so what differs in KL ")


@pytest.mark.parametrize(
    ("kl", "cases"),
    [(2.0, "none of 2 cases"), (3.0, "1 of 2 cases"), (1.5, "1 of 2 cases")],
    ids=["in-proportion", "dearer", "cheaper"],
)
def test_with_two_rules_the_answer_compares_them_at_one_ratio(kl: float, cases: str) -> None:
    found = invented([[0.1, 0.2], [0.05, 0.1]], [[1.0, kl], [0.5, 1.0]], (None, 1))
    *_, why = answer(found)
    assert why.startswith("A higher ratio costs more KL: taken in proportion ")
    assert f"beyond two standard errors in {cases} in which " in why
    assert why.endswith({2.0: "warm-up.", 3.0: "(1 higher, 0 lower).", 1.5: "(0 higher, 1 lower)."}[kl])


@pytest.fixture(scope="module")
def digits_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another kind of text than `text_file`."""
    draw = random.Random(1)
    path = tmp_path_factory.mktemp("digits") / "digits.txt"
    path.write_text("\n\n".join("".join(draw.choices("0123456789+=", k=1000)) for _ in range(64)))
    return path


@pytest.fixture(scope="module")
def command(plateau_folder: Path, text_file: Path, digits_file: Path) -> tuple[object, ...]:
    return ("compare-text", plateau_folder, "--dataset", text_file, "--dataset", digits_file, *SMALL)


@pytest.fixture(scope="module")
def document(command: tuple[object, ...]) -> Any:
    return json.loads(succeed(*command, "--format", "json").stdout)


def test_json_holds_every_profile_on_every_text(document: Any, text_file: Path) -> None:
    names = ["log.txt", "digits.txt"]
    assert document["schema"] == "ffnskip-compare-text/v1"
    assert (document["model"], document["target_ratio"]) == ("plateau", 0.1)
    assert [text["name"] for text in document["texts"]] == names
    assert [text["held_out"]["tokens_used"] for text in document["texts"]] == [512, 512]
    assert [row["calibrated_on"] for row in document["profiles"]] == names
    for row in document["profiles"]:
        assert row["calibration_ratio"] == pytest.approx(0.1, abs=0.01)
        assert (row["window"], row["refresh_every"], row["warm_up"]) == (None, None, 4)
    cells = document["cells"]
    assert [(cell["calibrated_on"], cell["measured_on"]) for cell in cells] == [(a, b) for a in names for b in names]
    for cell in cells:
        assert (cell["difference"] is None) == (cell["calibrated_on"] == cell["measured_on"])
        assert all(error > 0 for error in cell["standard_error"].values())
        assert math.isfinite(cell["kl"])
    assert str(text_file.parent) not in json.dumps(document)


def test_csv_has_a_line_for_every_profile_and_text(command: tuple[object, ...], document: Any) -> None:
    rows = list(csv.DictReader(io.StringIO(succeed(*command, "--format", "csv").stdout)))
    for row, cell in zip(rows, document["cells"], strict=True):
        assert (row["calibrated_on"], row["measured_on"]) == (cell["calibrated_on"], cell["measured_on"])
        assert (float(row["skip_ratio"]), float(row["kl"])) == (cell["skip_ratio"], cell["kl"])
        assert float(row["kl_standard_error"]) == cell["standard_error"]["kl"]
        assert (row["window"], row["warm_up"]) == ("", "4")


@pytest.mark.parametrize("format", ["table", "md"])
def test_people_read_two_matrices_and_the_answer(command: tuple[object, ...], document: Any, format: str) -> None:
    result = succeed(*command, "--format", format)
    cell = document["cells"][1]
    for figure in ("skip_ratio", "kl"):
        assert f"{cell[figure]:.3f} ± {cell['standard_error'][figure]:.3f}" in result.stdout
    bullet = "- " if format == "md" else ""
    assert result.stdout.splitlines()[-len(document["answer"]) :] == [bullet + line for line in document["answer"]]
    assert "Forward passes at most: record similarities (32), solve and verify (256), measure quality (48)." in (
        result.stderr
    )
    assert talk(result) == []


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_the_matrices_are_drawn_in_shades_of_grey_and_the_same_each_time(
    comparison: Comparison, tmp_path: Path, suffix: str
) -> None:
    one, again = tmp_path / f"one{suffix}", tmp_path / f"again{suffix}"
    for path in (one, again):
        plot_comparison(comparison, "org/pico $1", path)
    assert one.read_bytes() == again.read_bytes()
    if suffix == ".png":
        picture = imread(one)
        assert (picture[..., 0] == picture[..., 1]).all()
        assert (picture[..., 1] == picture[..., 2]).all()
    if suffix == ".svg":
        drawn = one.read_text()
        for row in comparison.measured:
            for quality in row:
                assert f">{quality.skip_ratio.mean:.3f}<" in drawn
                assert f">{quality.kl.mean:.3f}<" in drawn
        for label in ("calibrated on", "measured on", "of 4", "of 90", "org/pico $1"):
            assert f">{label}<" in drawn


def test_the_plot_is_written_beside_the_result(command: tuple[object, ...], tmp_path: Path) -> None:
    path = tmp_path / "matrix.svg"
    result = succeed(*command, "--plot", path)
    assert talk(result) == [f"Wrote {path}."]
    assert ">digits.txt<" in path.read_text()
    assert list(tmp_path.iterdir()) == [path]


def test_help_speaks_of_no_option_that_the_command_lacks() -> None:
    assert "--rule" not in succeed("compare-text", "--help").stdout


def test_a_plot_that_cannot_be_drawn_is_refused_before_the_model_is_looked_at(tmp_path: Path) -> None:
    start = ("compare-text", tmp_path / "none", "--dataset", "self", "--dataset", "demo", "--plot")
    assert mistake(*start, "m.html") == "cannot plot to m.html: name a file that ends with .png, .svg or .pdf."
    assert mistake(*start, "/dev/null/m.svg") == "/dev/null/m.svg cannot be written: name another --plot."


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        ([], "A comparison needs at least two texts: name each with a --dataset of its own."),
        (["self"], "A comparison needs at least two texts: name each with a --dataset of its own."),
        (["self", "demo=3"], "Texts are compared one by one, not mixed: leave the weight of demo out."),
        (["self", "none.txt"], "no such file: none.txt"),
    ],
)
def test_texts_that_cannot_be_compared_are_refused_before_the_model_is_looked_at(
    tmp_path: Path, names: list[str], sentence: str
) -> None:
    options = [part for name in names for part in ("--dataset", name)]
    assert mistake("compare-text", tmp_path / "none", *options, "--offline") == sentence


def test_a_text_named_twice_or_like_another_is_refused(text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(FfnskipError, match="named twice"):
        check_texts([str(text_file), str(text_file)], offline=True)
    twin = tmp_path / text_file.name
    twin.write_text("other words")
    with pytest.raises(FfnskipError, match=r"^Two of the texts are called log\.txt: rename one of the files\.$"):
        check_texts([str(text_file), str(twin)], offline=True)


def test_a_text_that_falls_short_is_pointed_out(command: tuple[object, ...]) -> None:
    result = succeed(*command, "--eval-tokens", 100_000, "--sequence-length", 512)
    warnings = [line for line in talk(result) if line.startswith("Warning: 100000 tokens of evaluation text")]
    assert [line.partition("and ")[2].split(" has only ")[0] for line in warnings] == ["log.txt", "digits.txt"]


@pytest.mark.parametrize(("length", "warm_up"), [(64, 16), (128, 25)])
def test_without_warm_up_all_profiles_have_the_papers_or_a_quarter_of_the_sequence(
    command: tuple[object, ...], length: int, warm_up: int
) -> None:
    model, *texts = command[1:6]
    sizes = ("--tokens", 1024, "--eval-tokens", 512, "--sequence-length", length)
    result = succeed("compare-text", model, *texts, *sizes, "--target", 0.05, "--format", "json")
    assert {row["warm_up"] for row in json.loads(result.stdout)["profiles"]} == {warm_up}


def test_a_window_can_be_asked_for(command: tuple[object, ...]) -> None:
    found = json.loads(succeed(*command, "--window", 1, "--cold-s", 1, "--cold-e", 7, "--format", "json").stdout)
    for row in found["profiles"]:
        assert (row["window"], row["cold_s"], row["cold_e"]) == (1, 1, 7)
    assert found["cells"][1]["difference"]["same_rule"]
