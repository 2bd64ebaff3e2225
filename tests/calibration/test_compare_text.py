"""`ffnskip compare-text`, and the comparison behind it."""

import csv
import hashlib
import io
import json
import math
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.image import imread
from support.calibrations import paper_settings
from support.cli import mistake, succeed, talk
from support.pico import pico_model, pico_source, pico_tokens
from support.sentences import numbers

from ffnskip import FfnskipError
from ffnskip.profiles.profile import Profile
from ffnskip_cli.calibration.compare import ComparedText, Comparison, build_texts, compare
from ffnskip_cli.calibration.lab import Lab
from ffnskip_cli.calibration.rules.cosine.compiler import CosineCompiler
from ffnskip_cli.calibration.settings import Goal
from ffnskip_cli.calibration.threshold.solve import GOOD_ENOUGH
from ffnskip_cli.measure.quality import Estimate, measure_quality
from ffnskip_cli.progress import silently
from ffnskip_cli.report.compare_text import answer
from ffnskip_cli.report.heat_map import plot_comparison
from ffnskip_cli.sources.models import load_model
from ffnskip_cli.text.corpus import Corpus
from ffnskip_cli.text.sources import open_text

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
    return compare(Lab(model), pico_source(model), texts, SETTINGS)


def test_the_diagonal_is_what_calibrate_writes_into_a_profile_for_the_text(comparison: Comparison) -> None:
    for index, each in enumerate(comparison.calibrated):
        assert each.calibration_ratio == pytest.approx(TARGET, abs=GOOD_ENOUGH)
        quality, profile = comparison.measured[index][index], each.profile
        assert profile.calibration
        assert profile.calibration.dataset == ("text-4", "text-90")[index]
        assert profile.measured
        for figure in ("skip_ratio", "kl", "perplexity_dense", "perplexity"):
            assert getattr(quality, figure).mean == pytest.approx(getattr(profile.measured, figure), rel=1e-4)


def test_off_the_diagonal_a_profile_is_measured_on_the_other_text(
    comparison: Comparison, texts: list[ComparedText]
) -> None:
    model = pico_model(dtype=torch.float64)
    for row, column in ((0, 1), (1, 0)):
        profile = comparison.calibrated[row].profile
        (alone,) = measure_quality(model, [profile], texts[column].held_out.tokens, silently)
        assert comparison.measured[row][column] == alone


def test_profiles_with_different_warm_ups_are_measured_at_the_same_positions(
    texts: list[ComparedText], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, warm_ups = pico_model(dtype=torch.float64), iter((2, 7))

    def choose(compiler: CosineCompiler, *arguments: Any) -> Profile:
        draft = real(compiler, *arguments)
        return draft.model_copy(update={"skip": draft.skip.model_copy(update={"warm_up": next(warm_ups)})})

    real = CosineCompiler.choose
    monkeypatch.setattr(CosineCompiler, "choose", choose)
    found = compare(Lab(model), pico_source(model), texts, SETTINGS)
    assert [each.profile.skip.warm_up for each in found.calibrated] == [2, 7]
    for (one, other), text in zip(zip(*found.measured, strict=True), texts, strict=True):
        assert one.nll_dense == other.nll_dense
        assert one.tokens == len(text.held_out.tokens) * (LENGTH - 1 - 7)
    assert "different rules" in answer(found)[-1]


def test_a_text_that_cannot_be_calibrated_on_is_named(texts: list[ComparedText]) -> None:
    model = pico_model(dtype=torch.float64)
    impossible = replace(SETTINGS, goals=(Goal("target_ratio", 0.9),))
    with pytest.raises(FfnskipError, match=r"^Calibrating on of 4: A skip ratio of 0\.9 cannot be reached"):
        compare(Lab(model), pico_source(model), texts, impossible)


def test_kl_is_compared_with_the_text_s_own_profile_sequence_by_sequence(comparison: Comparison) -> None:
    a, b = (torch.tensor(comparison.measured[row][1].kl_by_sequence) for row in (0, 1))
    difference = comparison.kl_difference(0, 1)
    assert difference.mean == pytest.approx(float((a - b).mean()))
    assert difference.standard_error == pytest.approx(float((a - b).std()) / len(a) ** 0.5)


def test_the_answer_states_the_ratios_and_the_largest_difference_in_kl(comparison: Comparison) -> None:
    ratios, kl, rule = answer(comparison)
    assert "same rule" in rule
    table = [[quality.skip_ratio.mean for quality in row] for row in comparison.measured]
    own_kind, elsewhere = sorted((table[0][0], table[1][1])), sorted((table[0][1], table[1][0]))
    assert [float(number) for number in numbers(ratios)] == pytest.approx([TARGET, *own_kind, *elsewhere], abs=5e-4)
    column = max((0, 1), key=lambda column: abs(comparison.kl_difference(1 - column, column).mean))
    for row in (0, 1):
        assert f"{comparison.measured[row][column].kl.mean:.3f} ± " in kl
        assert f"at ratio {table[row][column]:.3f}" in kl


@pytest.mark.parametrize(("error", "beyond"), [(0.0, "2 of 2"), (math.inf, "none of 2")])
def test_differences_beyond_two_standard_errors_are_counted(
    comparison: Comparison, monkeypatch: pytest.MonkeyPatch, error: float, beyond: str
) -> None:
    monkeypatch.setattr(Comparison, "kl_difference", lambda self, row, column: Estimate(0.1, error))
    assert beyond in answer(comparison)[1]


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

    monkeypatch.setattr("ffnskip_cli.text.named.sample_documents", sample)
    settings = replace(SETTINGS, tokens=40_000, eval_tokens=4000, sequence_length=32)
    texts = build_texts(load_model(str(pico_folder)), [str(path), "self"], settings, offline=True)
    assert [text.name for text in texts] == ["own.txt", "self"]
    digests = [hashlib.sha256(word.encode()).digest() for word in own_words]
    held_out_by_content = {digest for digest in digests if digest[0] % 8 == 0}
    assert texts[1].calibration.document_hashes & held_out_by_content
    for text in texts:
        assert text.held_out.tokens_used > 0
        for other in texts:
            assert text.held_out.document_hashes.isdisjoint(other.calibration.document_hashes)


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
def test_people_read_two_matrices_and_the_answer_beside_a_plot(
    command: tuple[object, ...], document: Any, format: str, tmp_path: Path
) -> None:
    path = tmp_path / "matrix.svg"
    result = succeed(*command, "--format", format, "--plot", path)
    cell = document["cells"][1]
    for figure in ("skip_ratio", "kl"):
        assert f"{cell[figure]:.3f} ± {cell['standard_error'][figure]:.3f}" in result.stdout
    bullet = "- " if format == "md" else ""
    assert result.stdout.splitlines()[-len(document["answer"]) :] == [bullet + line for line in document["answer"]]
    budget = "record similarities (32), solve and verify (256), measure quality (32), compare the profiles (48)"
    assert f"Forward passes at most: {budget}." in result.stderr
    assert talk(result) == [f"Wrote {path}."]
    assert ">digits.txt<" in path.read_text()
    assert list(tmp_path.iterdir()) == [path]


def test_the_matrices_are_drawn_in_shades_of_grey_and_the_same_each_time(
    comparison: Comparison, tmp_path: Path
) -> None:
    for suffix in (".png", ".svg", ".pdf"):
        for name in ("first", "again"):
            plot_comparison(comparison, "org/pico $1", tmp_path / f"{name}{suffix}")
        assert (tmp_path / f"first{suffix}").read_bytes() == (tmp_path / f"again{suffix}").read_bytes()
    picture = imread(tmp_path / "first.png")
    assert (picture[..., :1] == picture[..., :3]).all()
    drawn = (tmp_path / "first.svg").read_text()
    figures = [quality for row in comparison.measured for quality in row]
    cells = [f"{figure.mean:.3f}" for quality in figures for figure in (quality.skip_ratio, quality.kl)]
    for label in ("calibrated on", "measured on", "of 4", "of 90", "org/pico $1", *cells):
        assert f">{label}<" in drawn


def test_the_rule_is_the_papers_and_no_option() -> None:
    assert "--rule" not in succeed("compare-text", "--help").stdout


def test_a_plot_that_cannot_be_drawn_is_refused_before_the_model_is_looked_at(tmp_path: Path) -> None:
    start = ("compare-text", tmp_path / "none", "--dataset", "self", "--dataset", "demo", "--plot")
    assert mistake(*start, "m.html") == "cannot plot to m.html: name a file that ends with .png, .svg or .pdf."
    assert mistake(*start, "/dev/null/m.svg") == "/dev/null/m.svg cannot be written: name another --plot."


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (["self"], "A comparison needs at least two texts: name each with a --dataset of its own."),
        (["self", "demo=3"], "Texts are compared one by one, not mixed: leave the weight of demo out."),
        (["self", "none.txt"], "no such file: none.txt"),
        (["log.txt", "log.txt"], "the text log.txt is named twice: name it once, with the sum of both weights"),
        (["log.txt", "other/log.txt"], "Two of the texts are called log.txt: rename one of the files."),
    ],
)
def test_texts_that_cannot_be_compared_are_refused_before_the_model_is_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: list[str], sentence: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").mkdir()
    for path in ("log.txt", "other/log.txt"):
        (tmp_path / path).write_text("words")
    options = [part for name in names for part in ("--dataset", name)]
    assert mistake("compare-text", "none", *options, "--offline") == sentence


@pytest.mark.parametrize(("length", "warm_up"), [(64, 16), (128, 25)])
def test_without_warm_up_all_profiles_have_the_papers_or_a_quarter_of_the_sequence(
    command: tuple[object, ...], length: int, warm_up: int
) -> None:
    sizes = ("--tokens", 1024, "--eval-tokens", 512, "--sequence-length", length)
    result = succeed(*command[:6], *sizes, "--target", 0.05, "--format", "json")
    assert {row["warm_up"] for row in json.loads(result.stdout)["profiles"]} == {warm_up}


def test_options_pin_the_rule_and_a_text_that_falls_short_is_pointed_out(command: tuple[object, ...]) -> None:
    rule = ("--window", 1, "--cold-s", 1, "--cold-e", 7)
    result = succeed(*command, *rule, "--eval-tokens", 100_000, "--sequence-length", 512, "--format", "json")
    for row in json.loads(result.stdout)["profiles"]:
        assert (row["window"], row["cold_s"], row["cold_e"]) == (1, 1, 7)
    warnings = [line for line in talk(result) if line.startswith("Warning: 100000 tokens of evaluation text")]
    assert [line.partition("and ")[2].split(" has only ")[0] for line in warnings] == ["log.txt", "digits.txt"]
