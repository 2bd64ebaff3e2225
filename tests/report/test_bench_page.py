"""The page of a benchmark: every table and picture of its document, whole in itself and readable on a phone."""

from pathlib import Path
from typing import Any

import pytest
from support.browser import PHONE, body_width, opened

from ffnskip_cli.bench.rows import empty_row
from ffnskip_cli.report.bench import Format, page, print_bench

ATTACK = "</td><script>fetch('https://example.org')</script>"


def row(name: str, kl: float, saved: float) -> dict[str, Any]:
    figures = {"kl": kl, "flops_saved_past_warm_up": saved, "kl_percentiles": {"99": 9 * kl}, "perplexity": 20.0}
    return empty_row(name) | figures


@pytest.fixture
def document() -> dict[str, Any]:
    rows = [row("dense", 0.0, 0.0), row("ffnskip", 0.0123, 0.1), row("teal", 0.0234, 0.1), empty_row("cats", "no gate")]
    rows[1]["kl_by_layer"] = [0.0, 0.001, 0.002]
    rule = {"name": "profile", "threshold": 0.5, "skip_ratio": 0.2}
    return {
        "model": f"org/{ATTACK}",
        **{"profile": ATTACK, "threshold": 1.5, "dtype": "float32", "weights": "auto", "device": "cpu"},
        **{"path": "fused", "eval_tokens": 512, "eval_dataset": "demo"},
        "rows": rows,
        "sweep": [
            {"target": 0.2, "threshold": 2.5, "missing": None, "rows": [row("ffnskip", 0.0456, 0.2)]},
            {"target": 0.9, "threshold": None, "missing": "0.9 is out of reach.", "rows": []},
        ],
        "worst_case": [
            rule | {"from": 0, "length": 64, "never_skip_fraction": 0.0625, "never_skip_fraction_here": 0.0625}
        ],
        "warm_up": [{"warm_up": n, "kl": 0.3 / (n + 1), "standard_error": 0.01, "repetition": 0.1} for n in (0, 5)],
    }


def test_the_page_has_every_figure_in_a_browser_and_asks_nobody_for_anything(
    document: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "page.html").write_text(page(document))
    with opened(tmp_path / "page.html") as seen:
        text = seen.page.inner_text("body")
        for figure in ("0.0123", "0.0234", "0.0456", "6.25%", "0.00200", "0.3000"):
            assert figure in text, figure
        assert "No row cats: no gate." in text
        assert "0.9 is out of reach." in text
        assert ATTACK in text
        assert seen.page.locator("figure").count() == 3
        assert body_width(seen) <= PHONE["width"]
        assert (seen.console, seen.requests) == ([], [])


@pytest.mark.parametrize("format", ["table", "md", "csv"])
def test_people_are_told_how_a_speed_up_is_taken_where_one_was_measured(
    format: Format, document: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    def said() -> bool:
        print_bench(document, format)
        return "median" in capsys.readouterr().out

    assert not said()
    document["rows"][1]["speedup"] = 1.1
    assert said() is (format != "csv")
