"""What `ffnskip calibrate` prints of the profiles that it made."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from support import factories
from support.factories import CALIBRATION, TEXT, make_compensated, make_profile

from ffnskip.profiles.profile import Profile, load_profile
from ffnskip_cli.calibration.assemble import Calibrated
from ffnskip_cli.calibration.settings import Goal
from ffnskip_cli.commands.calibrate_run import write
from ffnskip_cli.commands.options import Format

GOAL = Goal("target_ratio", 0.25)
MEASURED = {**factories.MEASURED, "target_ratio": 0.25, "skip_ratio": 0.24, "standard_error": {"skip_ratio": 0.02}}
SECTIONS = {"calibration": CALIBRATION, "evaluation": {**TEXT, "dataset": "c4"}, "measured": MEASURED}


def damage(**overrides: Any) -> Profile:
    settings = {"rule": "predicted-damage", "rank": 3, "neurons": 4, "threshold": 0.0125}
    return make_compensated("low-rank", **{**settings, **SECTIONS, **overrides})


def written(profile: Profile, folder: Path, format: Format, capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    """What was printed on stdout and, with its lines joined, on stderr."""
    write([Calibrated(GOAL, profile, 0.251)], {GOAL: folder / "0.25.yaml"}, format)
    captured = capsys.readouterr()
    return captured.out, " ".join(captured.err.split())


def figures(page: str) -> dict[str, str]:
    lines = [line.split("  ", 1) for line in page.partition("\n\n")[0].splitlines()]
    return {name.strip(): value.strip() for name, value in (line for line in lines if len(line) == 2)}


def test_a_table_names_rule_and_compensation_and_leaves_out_what_means_nothing_under_the_rule(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = figures(written(damage(), tmp_path, "table", capsys)[0])
    assert (table["rule"], table["compensation"]) == ("predicted-damage", "low-rank 3 + 4 neurons")
    assert table["threshold (nats)"] == "0.012500"
    assert {"window", "refresh every"}.isdisjoint(table)
    refreshed = figures(written(damage(refresh_every=6), tmp_path, "table", capsys)[0])
    assert (refreshed["refresh every"], "window" in refreshed) == ("6", False)


def test_the_papers_rule_keeps_its_window_and_its_threshold_has_no_unit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = figures(written(make_profile(**SECTIONS), tmp_path, "table", capsys)[0])
    assert (table["rule"], table["compensation"]) == ("cosine", "none")
    assert (table["window"], table["refresh every"], table["threshold"]) == ("–", "–", "0.900000")


@pytest.mark.parametrize("profile", [damage(), make_profile(**SECTIONS)], ids=["predicted-damage", "cosine"])
def test_programs_get_the_same_fields_under_both_rules(
    profile: Profile, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (row,) = csv.DictReader(io.StringIO(written(profile, tmp_path, "csv", capsys)[0]))
    assert list(row)[2:9] == ["rule", "compensation", "region", "window", "refresh_every", "warm_up", "threshold"]
    (found,) = json.loads(written(profile, tmp_path, "json", capsys)[0])["profiles"]
    assert (found["rule"], found["compensation"]) == (row["rule"], row["compensation"])
    assert found["profile"] == load_profile(tmp_path / "0.25.yaml").model_dump(mode="json", by_alias=True)


@pytest.mark.parametrize(
    ("profile", "decides"),
    [
        (damage(), "the damage that skipping an FFN is predicted to do"),
        (make_profile(**SECTIONS), "how little an FFN turns a token"),
    ],
    ids=["predicted-damage", "cosine"],
)
def test_a_ratio_that_moves_on_another_text_is_explained_by_the_rule(
    profile: Profile, decides: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, said = written(profile, tmp_path, "table", capsys)
    assert "skips 0.240 ± 0.020 of the FFNs on c4:train, and 0.251 on wikitext:train" in said
    assert f"the threshold is on {decides}, not on how many are skipped" in said
