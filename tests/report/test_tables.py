"""Tables, and the curve of characters."""

import csv
import io
import json

import pytest
from support.factories import MEAN, SIMILARITY, make_compensated, profile_with_curve

from ffnskip.profiles.profile import Profile
from ffnskip_cli.report.curve import draw
from ffnskip_cli.report.tables import Column, print_json, render

COLUMNS = [Column("name", "row"), Column("ratio", "skipped", ".1%"), Column("speed", "tok/s", ".2f")]
ROWS = [
    {"name": "dense|[b]", "ratio": 0.0, "speed": 10.123456789},
    {"name": "ffnskip", "ratio": 0.25, "speed": None},
    {"name": "random", "ratio": float("nan"), "speed": float("inf")},
]


def test_a_table_shows_numbers_as_asked_and_a_dash_for_what_was_not_measured(
    capsys: pytest.CaptureFixture[str],
) -> None:
    render(ROWS, COLUMNS, "table", title="speed [of] all")
    title, header, _, *rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert title == ["speed", "[of]", "all"]
    assert header == ["row", "skipped", "tok/s"]
    assert rows[:3] == [["dense|[b]", "0.0%", "10.12"], ["ffnskip", "25.0%", "–"], ["random", "–", "–"]]


def test_a_table_is_never_cut_off_or_wrapped(capsys: pytest.CaptureFixture[str]) -> None:
    wide = [Column(f"c{i}", f"c{i}") for i in range(20)]
    render([{column.key: "x" * 60 for column in wide}], wide)
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split() == ["x" * 60] * 20
    assert not any(line.endswith(" ") for line in lines)


def test_markdown_escapes_bars_and_aligns_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    render(ROWS[:2], COLUMNS, "md", title="speed")
    assert capsys.readouterr().out.splitlines() == [
        "## speed",
        "",
        "| row | skipped | tok/s |",
        "|:---|---:|---:|",
        "| dense\\|\\[b\\] | 0.0% | 10.12 |",
        "| ffnskip | 25.0% | – |",
        "",
    ]


def test_csv_has_keys_full_numbers_and_nothing_for_what_was_not_measured(capsys: pytest.CaptureFixture[str]) -> None:
    render([*ROWS, {"name": 'a "b", c'}], COLUMNS, "csv", title="left out")
    assert list(csv.reader(io.StringIO(capsys.readouterr().out))) == [
        ["name", "ratio", "speed"],
        ["dense|[b]", "0.0", "10.123456789"],
        ["ffnskip", "0.25", ""],
        ["random", "", ""],
        ['a "b", c', "", ""],
    ]


def test_json_is_one_document_of_shortest_numbers_without_nan(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"rows": [{"a": 0.1, "b": float("nan"), "c": (1, float("-inf"), None, "–")}]})
    out = capsys.readouterr().out
    assert json.loads(out) == {"rows": [{"a": 0.1, "b": None, "c": [1, None, None, "–"]}]}
    assert '"a": 0.1,' in out


def rows_of(profile: Profile) -> list[str]:
    return draw(profile.similarity, profile.skip).splitlines()[1:]


def test_the_curve_has_a_row_for_every_layer_with_its_figures_and_its_region() -> None:
    lines = rows_of(profile_with_curve(MEAN, cold_s=1, cold_e=5))[:6]
    assert ["off the axis" in line for line in lines] == [True, False, False, False, False, True]
    rows = [line.split() for line in lines]
    assert [int(row[0]) for row in rows] == list(range(6))
    assert [row[-1] for row in rows] == ["cold", "skip", "skip", "skip", "skip", "cold"]
    assert [row[-5:-1] for row in rows][3] == ["0.9700", "0.9600", "–", "0.9700"]


def bar_length(row: str) -> float:
    return sum(1 if character == "█" else (" ▏▎▍▌▋▊▉".index(character) / 8) for character in row[7:47].strip(" ┊"))


def test_bars_of_the_skip_region_are_told_apart_and_in_proportion_to_an_axis_that_ends_at_1() -> None:
    lengths = [bar_length(row) for row in rows_of(profile_with_curve(MEAN, cold_s=1, cold_e=5))[1:5]]
    floor = 1 - 1.1 * 0.06
    assert lengths == pytest.approx([40 * (x - floor) / (1 - floor) for x in MEAN[1:5]], abs=1 / 16)
    assert 0 < lengths[0] < lengths[-1] / 2


def test_the_threshold_stands_in_one_column_right_of_the_bars_that_do_not_reach_it() -> None:
    *rows, legend = rows_of(profile_with_curve(MEAN, cold_s=1, cold_e=5, threshold=0.96))
    assert [row.find("┊") >= 0 for row in rows] == [True, True, True, False, False, True]
    assert len({row.find("┊") for row in rows} - {-1}) == 1
    assert legend.strip() == "┊ threshold 0.9600"


@pytest.mark.parametrize(
    "profile",
    [
        *(profile_with_curve(MEAN, threshold=threshold) for threshold in (-5.0, 1.5)),
        *(profile_with_curve(mean, threshold=5.0) for mean in ([1.0] * 6, [-0.99] * 6, [0.9999, 1.0] * 3)),
        make_compensated("mean", rule="predicted-damage", threshold=0.97, similarity=SIMILARITY),
    ],
)
def test_a_threshold_beyond_the_axis_or_in_nats_is_not_drawn(profile: Profile) -> None:
    rows = rows_of(profile)
    assert len(rows) == 6
    assert "┊" not in "".join(rows)
    assert profile.skip.threshold != 5.0 or len({len(row) for row in rows}) == 1  # extremes are as wide as others
