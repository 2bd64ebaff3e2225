"""The page of an evaluation: whole in itself, readable on a phone, and safe whatever a model writes."""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")

from support.browser import PHONE, body_width, opened
from support.factories import MEAN, profile_with_curve

from ffnskip_cli.evaluation import writing
from ffnskip_cli.evaluation.errors import paired
from ffnskip_cli.evaluation.figures import Pair
from ffnskip_cli.report.evaluation import page, print_evaluation
from ffnskip_cli.report.html import Section, compact
from ffnskip_cli.report.plot import plot_profile
from ffnskip_cli.report.tables import Column

ATTACK = "</pre><script>fetch('https://example.org')</script><img src=https://example.org/x.png onerror=alert(1)>"
LONG = "Donaudampfschifffahrt" * 40


@pytest.fixture
def pairs() -> list[Pair]:
    talks = [
        Pair("mt_bench", f"turn {turn}", number, f"question {number}", "", "one two three", "one two four")
        for number in range(3)
        for turn in (1, 2)
    ]
    return [*talks, Pair("gsm8k", "", 0, ATTACK, ATTACK, ATTACK, LONG)]


@pytest.fixture
def document(pairs: list[Pair]) -> dict[str, Any]:
    row = paired([1.0, 0.0, 1.0, 1.0], [1.0, 0.0, 0.0, 1.0]).row(task="gsm8k", metric="exact_match", filter="strict")
    judged = {"task": "mt_bench", "wins": 1, "ties": 1, "losses": 0, "failed": 1, "score": 0.75, "score_stderr": 0.25}

    def tokenize(text: str) -> list[int]:
        return list(text.encode())

    return {
        "model": f"org/{ATTACK}",
        "profile": ATTACK,
        "dtype": "float32",
        "device": "cpu",
        "tasks": ["gsm8k", "mt_bench"],
        "num_fewshot": None,
        "limit": 4,
        "max_new_tokens": None,
        "answers": {"dense": "/somewhere/dense-1.jsonl", "ffnskip": "/somewhere/profile-2.jsonl"},
        "skip_ratio": 0.123,
        "never_skip_fraction": 0.25,
        "tokens_past_warm_up": 400,
        "warm_up_tokens": 100,
        "rows": [row],
        "writing": writing.rows(pairs, tokenize),
        "agreement": writing.agreement(pairs, tokenize),
        "judge": {"model": "judge", "rows": [judged], "failures": {"HTTP 500": 2}},
    }


def test_what_comes_from_a_model_or_a_file_is_text(document: dict[str, Any], pairs: list[Pair]) -> None:
    html = page(document, pairs)
    assert "<script" not in html
    assert "<img" not in html
    assert html.count("&lt;script&gt;fetch") >= 5
    assert "/somewhere" not in html


def test_the_page_is_whole_and_fits_a_phone(document: dict[str, Any], pairs: list[Pair], tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text(page(document, pairs), encoding="utf-8")
    with opened(path) as seen:
        assert seen.console == []
        assert seen.requests == []
        assert body_width(seen) <= PHONE["width"]
        for figure in ("0.7500", "-0.2500", "0.123", "HTTP 500 2"):
            assert seen.page.get_by_text(figure).first.is_visible()
        seen.page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
        assert body_width(seen) <= PHONE["width"]
        assert seen.page.locator("figure svg").count() == 2
        assert seen.page.get_by_text(LONG).is_visible()


def test_a_compact_table_has_names_in_one_column_and_errors_beside_their_figures() -> None:
    columns = (
        Column("task", "task"),
        Column("metric", "metric"),
        Column("n", "texts", "d"),
        Column("dense", "dense", ".2f"),
        Column("dense_stderr", "±", ".2f"),
    )
    rows = [{"task": "a", "metric": "", "n": 3, "dense": 0.5, "dense_stderr": None}]
    table = compact(Section("title", rows, columns))
    assert [column.header for column in table.columns] == ["", "texts", "dense"]
    assert [column.text(table.rows[0]) for column in table.columns] == ["a", "3", "0.50 ±\N{NO-BREAK SPACE}–"]


def test_a_profiles_page_fits_a_phone_too(tmp_path: Path) -> None:
    plot_profile(profile_with_curve(MEAN), tmp_path / "profile.html")
    with opened(tmp_path / "profile.html") as seen:
        assert (seen.console, seen.requests) == ([], [])
        assert body_width(seen) <= PHONE["width"]


@pytest.mark.parametrize("format", ["table", "md", "csv"])
def test_tables_of_all_kinds_have_the_errors_of_differences(
    document: dict[str, Any], format: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    print_evaluation(document, format)
    said = capsys.readouterr().out
    assert "-0.25" in said
    assert ("0.2500" in said) or ("0.25," in said)
    assert ("HTTP 500 2" in said) is (format != "csv")
    if format == "csv":
        widths = {line.count(",") for line in said.splitlines()}
        assert len(widths) == 1
