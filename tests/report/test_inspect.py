"""`ffnskip inspect`."""

import json
from pathlib import Path
from typing import Any

import pytest
from support import factories
from support.cli import run, succeed
from support.factories import SIMILARITY, make_compensated, make_profile
from typer.testing import Result

from ffnskip.profiles.profile import load_profile, parse_profile, save_profile
from ffnskip_cli.report.tables import markdown
from ffnskip_cli.report.words import explain

TEXT = {**factories.TEXT, "config": "wikitext-2-raw-v1", "revision": "ab" * 20}
CALIBRATION = {**TEXT, "seed": 7, "dtype": "bfloat16", "on": "text"}
MEASURED = {
    **factories.MEASURED,
    "target_ratio": 0.25,
    "skip_ratio": 0.2513,
    "perplexity": 7.31,
    "tokens": 8192,
    "standard_error": {"perplexity": 0.052},
    "verdict": "Worth it | mostly.",
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
    return run("inspect", folder / "profile.yaml", *options)


def test_the_page_holds_every_section_in_reading_order_with_errors_regions_and_shortfalls(tmp_path: Path) -> None:
    result = inspect(tmp_path, **FULL)
    assert (result.exit_code, result.stderr) == (0, "")
    sentences = explain(make_profile(**FULL))
    assert result.stdout.splitlines()[: len(sentences) + 1] == [*sentences, ""]
    tables = result.stdout.removeprefix("\n".join(sentences))
    landmarks = ["model\n", "org/tiny", "skip\n", "cosine", "text\n", "wikitext", "measured on 8,192 tokens\n"]
    landmarks += ["other thresholds\n", "made with\n", "Similarity cos(h, h + FFN(h)) by layer"]
    places = [tables.find(landmark) for landmark in landmarks]
    assert -1 not in places
    assert places == sorted(places)
    assert cells(tables, "skip_ratio") == ["25.13%", "–"]
    assert cells(tables, "perplexity") == ["7.310", "±", "0.052"]
    assert cells(tables, "dataset") == ["wikitext", "gsm8k"]
    assert cells(tables, "config") == ["wikitext-2-raw-v1", "–"]
    assert cells(tables, "seed") == ["7", "–"]
    assert cells(tables, "0.9910") == ["5.00%", "0.0100"]
    marks = [line.split()[-1] for line in tables.splitlines() if line.endswith(("cold", "skip"))]
    assert marks[-6:] == ["cold", "skip", "skip", "skip", "skip", "cold"]
    assert "The calibration text yielded only" not in result.stdout
    page = inspect(tmp_path, calibration={**CALIBRATION, "tokens_used": 1024}).stdout
    assert "The calibration text yielded only 1,024 of the 2,048 tokens" in page


def cells(page: str, name: str) -> list[str]:
    (row,) = [line.split() for line in page.splitlines() if line.split()[:1] == [name]]
    return row[1:]


@pytest.mark.parametrize(
    ("goal", "row"),
    [
        ({"target_ratio": 0.25}, ["target_ratio", "25.00%", "–"]),
        ({"max_kl": 0.25}, ["max_kl", "0.2500", "–"]),
        ({"max_perplexity_increase": 0.05}, ["max_perplexity_increase", "5.00%", "–"]),
    ],
)
def test_the_goal_is_the_first_of_the_figures_and_the_only_one(
    tmp_path: Path, goal: dict[str, float], row: list[str]
) -> None:
    page = inspect(tmp_path, measured={**MEASURED, "target_ratio": None, **goal}).stdout
    rows = [line.split() for line in page.partition("measured on 8,192 tokens\n")[2].splitlines()]
    assert rows[2] == row
    assert rows[3][0] == "skip_ratio"


def test_what_was_tried_is_shown_best_first_with_the_chosen_marked(tmp_path: Path) -> None:
    rule = {"cold_s": 1, "cold_e": 5, "window": None, "refresh_every": None, "kl": 0.4, "standard_error": 0.03}
    trials = [{"warm_up": n, "kl": kl, "standard_error": 0.01, "repetition": 0.2} for n, kl in ((0, 0.5), (2, 0.3))]
    candidates = [rule, {**rule, "window": 1, "refresh_every": 6, "kl": 0.2, "standard_error": 0.0}]
    search = {"ratio": 0.1, "tokens": 2048, "candidates": candidates, "warm_up": trials}
    page = inspect(tmp_path, window=1, refresh_every=6, search=search).stdout
    tried = page.partition("rules tried at a ratio of 0.1 on 2,048 tokens\n")[2].splitlines()
    assert [line.split() for line in tried[2:4]] == [
        ["[1,", "5)", "1", "6", "0.2000", "0.0000", "chosen"],
        ["[1,", "5)", "–", "–", "0.4000", "0.0300"],
    ]
    warm_ups = page.partition("warm-ups tried\n")[2].splitlines()
    assert [line.split() for line in warm_ups[2:4]] == [
        ["2", "0.3000", "0.0100", "20.00%", "chosen"],
        ["0", "0.5000", "0.0100", "20.00%"],
    ]


def test_the_parts_of_a_mixture_have_a_table_of_their_own(tmp_path: Path) -> None:
    names = ("config", "split", "revision", "text_sha256")
    part = {**{name: TEXT[name] for name in names}, "weight": 2.0, "tokens_used": 1024}
    parts = [{**part, "dataset": dataset} for dataset in ("wikitext", "c4")]
    page = inspect(tmp_path, evaluation={**TEXT, "dataset": "mixture", "parts": parts}).stdout
    rows = page.partition("parts of the evaluation text\n")[2].splitlines()[2:4]
    same = ["wikitext-2-raw-v1", "train", "abababababababab…", "0123456789abcdef…", "2.0", "1024"]
    assert [row.split() for row in rows] == [["wikitext", *same], ["c4", *same]]
    assert "[]" not in page


def test_a_profile_without_optional_parts_is_shown_without_them(tmp_path: Path) -> None:
    result = inspect(tmp_path)
    assert (result.exit_code, "org/tiny" in result.stdout) == (0, True)
    for absent in ("text", "measured", "Verdict", "Similarity", "other thresholds"):
        assert absent not in result.stdout


def test_a_profile_of_predicted_damage_has_its_thresholds_in_nats_and_its_fit_in_a_table(tmp_path: Path) -> None:
    tried = [
        {"kind": "mean", "rank": None, "neurons": 0, "skip_ratio": 0.1, "flops_saved": 0.04},
        {"kind": "low-rank", "rank": 3, "neurons": 4, "skip_ratio": 0.2, "flops_saved": 0.081},
    ]
    fit = {"tokens": 4096, "text_sha256": "c" * 64, "gradient_tokens": 512, "ridge": 0.001, "ratio": 0.25}
    settings = {"rule": "predicted-damage", "rank": 3, "neurons": 4, "threshold": 0.0125, "similarity": SIMILARITY}
    curve, fit = [[0.02, 0.3, 0.2], [0.000512, 0.05, 0.01]], {**fit, "kl": [0.0712, 0.05], "tried": tried}
    profile = make_compensated("low-rank", **settings, curve=curve, fit=fit)
    save_profile(profile, tmp_path / "profile.yaml")
    page = succeed("inspect", tmp_path / "profile.yaml").stdout
    assert page.splitlines()[0] == explain(profile)[0]
    assert cells(page.partition("other thresholds\n")[0], "threshold") == ["0.0125", "nats"]
    assert cells(page, "rank") == ["3"]
    assert cells(page, "file") == [str(profile.compensation.file)]
    assert "window" not in page
    assert "┊" not in page
    curve = page.partition("other thresholds\n")[2].splitlines()
    assert curve[0].startswith("threshold (nats)")
    assert [line.split()[0] for line in curve[2:4]] == ["0.000512", "0.02"]
    course = page.partition("fit\n")[2]
    assert cells(course, "text_sha256")[0] == f"{'c' * 16}…"
    assert [line.split()[-1] for line in course.splitlines() if line.startswith("kl (")][:2] == ["0.0712", "0.0500"]
    compared = page.partition("compensations tried\n")[2].splitlines()
    assert [line.split() for line in compared[2:4]] == [
        ["low-rank", "3", "+", "4", "neurons", "20.00%", "8.10%", "chosen"],
        ["mean", "10.00%", "4.00%"],
    ]
    document = json.loads(succeed("inspect", tmp_path / "profile.yaml", "--format", "json").stdout)
    assert document == profile.model_dump(mode="json", by_alias=True)


def test_markdown_has_headings_tables_and_the_curve_as_code(tmp_path: Path) -> None:
    lines = inspect(tmp_path, "--format", "md", **FULL).stdout.splitlines()
    assert [f"- {markdown(sentence)}" for sentence in explain(make_profile(**FULL))] == lines[: lines.index("")]
    assert "## measured on 8,192 tokens" in lines
    assert "| perplexity | 7.310 | ± 0.052 |" in lines
    assert lines.count("```") == 2


def test_a_plot_of_the_panels_chosen_is_written_besides_the_page(tmp_path: Path) -> None:
    target = tmp_path / "curve.svg"
    result = inspect(tmp_path, "--format", "json", "--plot", str(target), "--panels", "kl,ratio", **FULL)
    assert result.exit_code == 0
    assert ["(a)" in target.read_text(), "cold region" in target.read_text()] == [True, False]
    document = json.loads(result.stdout)
    assert (document["schema"], document["curve"]) == ("ffnskip/v1", FULL["curve"])
    assert parse_profile(json.dumps(document)) == make_profile(**FULL)
    assert result.stderr == f"Wrote {target}.\n"


def test_a_profile_that_calibrate_made_has_the_data_for_every_panel(plateau_profiles: Path, tmp_path: Path) -> None:
    file, target = plateau_profiles / "0.30.yaml", tmp_path / "all.svg"
    measured = load_profile(file).measured
    assert sum(measured.first_skipped) + measured.never_skip_fraction == pytest.approx(1, abs=1e-4)
    result = run("inspect", file, "--plot", target)
    assert result.exit_code == 0
    assert "(d) Where skipping begins" in target.read_text()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--panels", "kl"], "--panels chooses what --plot draws: add --plot FILE."),
        (["--panels", "", "--plot", "x.svg"], "no panel is called '': choose from similarity, ratio, kl, first-skip."),
        (["--panels", "kl,all", "--plot", "x.svg"], "no panel is called 'all': choose from"),
        (["--panels", "first-skip", "--plot", "x.svg"], "the profile has no data for the panel first-skip"),
        (["--plot", "curve.jpg"], "cannot plot to curve.jpg"),
        (["--plot", "/dev/null/curve.png"], "cannot write /dev/null/curve.png"),
    ],
)
def test_what_cannot_be_plotted_is_a_mistake_of_the_user(tmp_path: Path, options: list[str], sentence: str) -> None:
    result = inspect(tmp_path, *options, **FULL)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(f"Error: {sentence}")


def test_a_broken_or_missing_profile_is_one_sentence(tmp_path: Path) -> None:
    result = run("inspect", tmp_path / "none.yaml")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == f"Error: {tmp_path / 'none.yaml'}: cannot be read (No such file or directory)\n"
