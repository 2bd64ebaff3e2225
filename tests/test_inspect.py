"""`ffnskip inspect`."""

import json
from pathlib import Path
from typing import Any

import pytest
from factories import make_profile
from typer.testing import CliRunner, Result

from ffnskip.profile import load_profile, parse_profile, save_profile
from ffnskip_cli.app import app

TEXT = {
    "dataset": "wikitext",
    "config": "wikitext-2-raw-v1",
    "split": "train",
    "revision": "ab" * 20,
    "text_sha256": "0123456789abcdef" * 4,
    "tokens_requested": 2048,
    "tokens_used": 2048,
    "sequence_length": 256,
}
CALIBRATION = {**TEXT, "seed": 7, "dtype": "bfloat16", "on": "text"}
MEASURED = {
    "target_ratio": 0.25,
    "skip_ratio": 0.2513,
    "flops_saved": 0.148,
    "never_skip_fraction": 0.004,
    "perplexity_dense": 7.04,
    "perplexity": 7.31,
    "kl": 0.041,
    "top1_agreement": 0.93,
    "tokens": 8192,
    "standard_error": {"perplexity": 0.052},
    "verdict": "Worth it | mostly.",
    "within_budget": True,
}
FULL = {
    "calibration": CALIBRATION,
    "evaluation": {**TEXT, "dataset": "gsm8k", "config": None},
    "measured": MEASURED,
    "similarity": {"mean": [0.06, 0.94, 0.95, 0.97, 0.98, 0.7], "low": [0.0] * 6, "high": [1.0] * 6},
    "curve": [[0.991, 0.05, 0.01], [0.9853, 0.2513, 0.041]],
}


def inspect(folder: Path, *options: str, **overrides: Any) -> Result:
    save_profile(make_profile(**overrides), folder / "profile.yaml")
    return CliRunner().invoke(app, ["inspect", str(folder / "profile.yaml"), *options])


def test_the_page_holds_every_section_in_reading_order(tmp_path: Path) -> None:
    result = inspect(tmp_path, **FULL)
    assert (result.exit_code, result.stderr) == (0, "")
    landmarks = [
        "model\n",
        "org/tiny",
        "skip\n",
        "cosine",
        "text\n",
        "wikitext",
        "measured on 8,192 tokens\n",
        "Verdict: Worth it | mostly.",
        "other thresholds\n",
        "made with\n",
        "Similarity cos(h, h + FFN(h)) by layer",
    ]
    places = [result.stdout.find(landmark) for landmark in landmarks]
    assert -1 not in places
    assert places == sorted(places)


def cells(page: str, name: str) -> list[str]:
    (row,) = [line.split() for line in page.splitlines() if line.split()[:1] == [name]]
    return row[1:]


def test_figures_come_with_their_standard_errors_and_texts_side_by_side(tmp_path: Path) -> None:
    page = inspect(tmp_path, **FULL).stdout
    assert cells(page, "skip_ratio") == ["25.13%", "–"]
    assert cells(page, "perplexity") == ["7.310", "±", "0.052"]
    assert cells(page, "dataset") == ["wikitext", "gsm8k"]
    assert cells(page, "config") == ["wikitext-2-raw-v1", "–"]
    assert cells(page, "seed") == ["7", "–"]
    assert cells(page, "0.9910") == ["5.00%", "0.0100"]


def test_cold_regions_are_marked_in_the_curve(tmp_path: Path) -> None:
    page = inspect(tmp_path, cold_s=2, cold_e=5, **FULL).stdout
    marks = [line.split()[-1] for line in page.splitlines() if line.endswith(("cold", "skip"))]
    assert marks[-6:] == ["cold", "cold", "skip", "skip", "skip", "cold"]


def test_a_profile_without_optional_parts_is_shown_without_them(tmp_path: Path) -> None:
    result = inspect(tmp_path)
    assert result.exit_code == 0
    assert "org/tiny" in result.stdout
    for absent in ("text", "measured", "Verdict", "Similarity", "other thresholds"):
        assert absent not in result.stdout


@pytest.mark.parametrize(("used", "pointed_out"), [(1024, True), (2048, False)])
def test_a_shortfall_of_tokens_is_pointed_out(tmp_path: Path, used: int, pointed_out: bool) -> None:
    page = inspect(tmp_path, calibration={**CALIBRATION, "tokens_used": used}).stdout
    assert ("The calibration text yielded only 1,024 of the 2,048 tokens" in page) is pointed_out


def test_json_is_the_profile_itself(tmp_path: Path) -> None:
    result = inspect(tmp_path, "--format", "json", **FULL)
    assert result.exit_code == 0
    document = json.loads(result.stdout)
    assert document["schema"] == "ffnskip/v1"
    assert document["curve"] == [[0.991, 0.05, 0.01], [0.9853, 0.2513, 0.041]]
    assert parse_profile(json.dumps(document)) == make_profile(**FULL)


def test_markdown_has_headings_tables_and_the_curve_as_code(tmp_path: Path) -> None:
    lines = inspect(tmp_path, "--format", "md", **FULL).stdout.splitlines()
    assert "## measured on 8,192 tokens" in lines
    assert "| perplexity | 7.310 | ± 0.052 |" in lines
    assert lines.count("```") == 2


def test_a_plot_is_written_besides_the_page(tmp_path: Path) -> None:
    target = tmp_path / "curve.svg"
    result = inspect(tmp_path, "--format", "json", "--plot", str(target), **FULL)
    assert result.exit_code == 0
    assert target.read_bytes().startswith(b"<?xml")
    assert json.loads(result.stdout)["schema"] == "ffnskip/v1"
    assert result.stderr == f"Wrote {target}.\n"


def test_panels_choose_what_is_plotted(tmp_path: Path) -> None:
    target = tmp_path / "curve.svg"
    assert inspect(tmp_path, "--plot", str(target), **FULL).exit_code == 0
    assert "(a)" in target.read_text()
    assert inspect(tmp_path, "--plot", str(target), "--panels", "kl", **FULL).exit_code == 0
    assert "nats per token" in target.read_text()
    assert "cold region" not in target.read_text()
    assert inspect(tmp_path, "--plot", str(target), "--panels", "kl,similarity", **FULL).exit_code == 0
    assert "cold region" in target.read_text()


def test_a_profile_that_calibrate_made_has_the_data_for_every_panel(plateau_profiles: Path, tmp_path: Path) -> None:
    file, target = plateau_profiles / "0.30.yaml", tmp_path / "all.svg"
    measured = load_profile(file).measured
    assert measured
    assert measured.first_skipped
    assert sum(measured.first_skipped) + measured.never_skip_fraction == pytest.approx(1, abs=1e-4)
    result = CliRunner().invoke(app, ["inspect", str(file), "--plot", str(target)])
    assert result.exit_code == 0
    assert "(d) Where skipping begins" in target.read_text()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--panels", "kl"], "--panels chooses what --plot draws: add --plot FILE."),
        (["--panels", "", "--plot", "x.svg"], "no panel is called '': choose from similarity, ratio, kl, first-skip."),
        (["--panels", "kl,all", "--plot", "x.svg"], "no panel is called 'all': choose from"),
        (["--panels", "first-skip", "--plot", "x.svg"], "the profile has no data for the panel first-skip"),
    ],
)
def test_panels_that_cannot_be_plotted_are_a_mistake_of_the_user(
    tmp_path: Path, options: list[str], sentence: str
) -> None:
    result = inspect(tmp_path, *options, **FULL)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(f"Error: {sentence}")


@pytest.mark.parametrize("options", [["--plot", "curve.jpg"], ["--plot", "missing/curve.png"]])
def test_a_plot_that_cannot_be_written_is_a_mistake_of_the_user(tmp_path: Path, options: list[str]) -> None:
    result = inspect(tmp_path, *options, **FULL)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("Error: cannot ")


def test_a_broken_or_missing_profile_is_one_sentence(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["inspect", str(tmp_path / "none.yaml")])
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == f"Error: {tmp_path / 'none.yaml'}: cannot be read (No such file or directory)\n"
