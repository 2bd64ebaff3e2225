"""A profile's pictures, and the page that holds them."""

import re
import sys
from html import escape
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread
from support import factories
from support.factories import MEAN, SIMILARITY, make_compensated, make_profile, profile_with_curve

from ffnskip.errors import FfnskipError
from ffnskip.profiles.profile import Profile
from ffnskip_cli.report.plot import TITLES, caption, drawings, plot_profile
from ffnskip_cli.report.words import explain


def damage_profile(**overrides: Any) -> Profile:
    settings = {"threshold": 0.01, "similarity": SIMILARITY, **overrides}
    return make_compensated("mean", rule="predicted-damage", **settings)


MEASURED = {
    **factories.MEASURED,
    "skip_ratio": 0.24,
    "standard_error": {"kl": 0.01, "skip_ratio": 0.02},
    "verdict": "within the quality budget <of all>",
    "first_skipped": [0.0, 0.0, 0.1, 0.3, 0.2, 0.0],
}
CURVE = [[0.95, 0.3, 0.5], [0.97, 0.1, 0.1]]


def full_profile(**overrides: Any) -> Profile:
    return profile_with_curve(MEAN, **{"measured": MEASURED, "curve": CURVE, **overrides})


def picture(folder: Path, profile: Profile, *panels: str, suffix: str = ".svg") -> str:
    plot_profile(profile, folder / f"picture{suffix}", panels)
    return (folder / f"picture{suffix}").read_text(encoding="utf-8")


SIGNATURES = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF", ".html": b"<!DOCTYPE html>"}


@pytest.mark.parametrize("suffix", SIGNATURES)
def test_a_picture_has_the_format_of_its_suffix_and_the_same_bytes_every_time(tmp_path: Path, suffix: str) -> None:
    files = [tmp_path / f"{name}{suffix}" for name in ("first", "second")]
    for file in files:
        plot_profile(full_profile(), file)
    first, second = (file.read_bytes() for file in files)
    assert first.startswith(SIGNATURES[suffix])
    assert first == second
    assert b"date" not in first.lower()
    assert sorted(tmp_path.iterdir()) == files


LABELS = {
    "similarity": (
        *("decoder layer", "cos(h, h + FFN(h))", "threshold 0.9600", "cold region", "10–90 % of tokens", "0.95"),
    ),
    "ratio": ("threshold of cos(h, h + FFN(h))", "skip ratio (% of FFNs)", "this profile, ± standard error"),
    "kl": ("skip ratio (% of FFNs)", "KL divergence (nats per token)", "this profile, ± standard error"),
    "first-skip": ("decoder layer of the first skipped FFN", "share of tokens (%)", "no FFN skipped: 40.0 %", "none"),
}


@pytest.mark.parametrize("panel", TITLES)
def test_a_panel_alone_names_its_axes_with_units_and_what_it_shows(tmp_path: Path, panel: str) -> None:
    svg = picture(tmp_path, full_profile(), panel)
    assert [words for words in LABELS[panel] if words not in svg] == []
    assert "(a)" not in svg


def test_all_panels_are_drawn_together_in_one_order_whatever_the_order_asked_for(tmp_path: Path) -> None:
    svg = picture(tmp_path, full_profile())
    titles = [f"({letter}) {title}" for letter, title in zip("abcd", TITLES.values(), strict=True)]
    assert [title for title in titles if title not in svg] == []
    assert picture(tmp_path, full_profile(), "kl", "first-skip", "ratio", "similarity") == svg


@pytest.mark.parametrize(
    ("lacking", "panels"),
    [
        ({"curve": []}, ["similarity", "first-skip"]),
        ({"measured": {**MEASURED, "first_skipped": None}}, ["similarity", "ratio", "kl"]),
        ({"measured": None, "curve": []}, ["similarity"]),
        ({"similarity": None}, ["ratio", "kl", "first-skip"]),
    ],
)
def test_panels_that_a_profile_lacks_the_data_for_are_left_out(
    tmp_path: Path, lacking: dict[str, Any], panels: list[str]
) -> None:
    profile = full_profile(**lacking)
    assert list(drawings(profile)) == panels
    svg = picture(tmp_path, profile)
    assert [name for name, title in TITLES.items() if title in svg] == (panels if len(panels) > 1 else [])


def test_of_a_rule_that_leaves_out_parts_what_tells_of_whole_ffns_is_drawn_only_when_asked_for(tmp_path: Path) -> None:
    parts = {"attention_input": 32, "attention_output": 32, "ffn_input": 32, "neurons": 48}
    evidence = {"similarity": SIMILARITY, "measured": MEASURED, "curve": NATS}
    profile = make_profile(rule="price", threshold=0.01, parts=parts, **evidence)
    assert [name for name, title in TITLES.items() if title in picture(tmp_path, profile)] == ["ratio", "kl"]
    assert "cos(h, h + FFN(h))" in picture(tmp_path, profile, "similarity")


def drawn(panel: str, profile: Profile | None = None, **overrides: Any) -> Any:
    axes = Figure().subplots()
    drawings(profile or full_profile(**overrides))[panel](axes)
    return axes


NATS = [[0.02, 0.3, 0.5], [0.005, 0.1, 0.1]]


def test_panels_of_predicted_damage_have_nats_on_the_axis_and_no_threshold_among_similarities() -> None:
    profile = damage_profile(threshold=0.97, measured=MEASURED, curve=NATS)
    assert [title for title in drawn("similarity", profile).get_legend_handles_labels()[1] if "thr" in title] == []
    axes = drawn("ratio", profile)
    assert axes.get_xlabel() == "threshold of the predicted damage (nats per skipped FFN)"
    curve = [(0.005, 10), (0.02, 30)]
    assert curve == points(axes.lines[0])


def test_captions_say_what_the_rule_goes_by_and_name_cold_regions_only_where_there_are_any() -> None:
    cosine, damage = full_profile(), damage_profile(cold_s=0, cold_e=6)
    rule = damage.skip.by
    assert [rule.decides_by in caption("similarity", profile) for profile in (cosine, damage)] == [False, True]
    assert [rule.axis in caption("ratio", profile) for profile in (cosine, damage)] == [False, True]
    assert ["cold regions" in caption("similarity", profile) for profile in (cosine, damage)] == [True, False]


def points(line: Any) -> list[tuple[float, float]]:
    return [pytest.approx(point) for point in zip(line.get_xdata(), line.get_ydata(), strict=True)]


@pytest.mark.parametrize(
    ("panel", "curve", "own"),
    [("ratio", [(0.95, 30), (0.97, 10)], (0.96, 24)), ("kl", [(30, 0.5), (10, 0.1)], (24, 0.2))],
)
def test_the_curve_and_the_profiles_own_point_are_where_they_belong(
    panel: str, curve: list[tuple[float, float]], own: tuple[float, float]
) -> None:
    line, own_point = drawn(panel).lines[:2]
    assert curve == points(line)
    assert [own] == points(own_point)


@pytest.mark.parametrize(("errors", "bars"), [({"kl": 0.01, "skip_ratio": 0.02}, 2), ({"kl": 0.01}, 1), ({}, 0)])
def test_error_bars_are_drawn_where_there_is_a_standard_error(errors: dict[str, float], bars: int) -> None:
    axes = drawn("kl", measured={**MEASURED, "standard_error": errors})
    assert len(axes.collections) == bars
    assert ("± standard error" in axes.get_legend_handles_labels()[1][-1]) is (bars > 0)


def test_bars_show_the_share_of_tokens_by_first_skipped_layer_and_of_those_that_skip_none() -> None:
    bars, none = drawn("first-skip").containers
    assert [bar.get_height() for bar in bars] == pytest.approx([0, 0, 10, 30, 20, 0])
    assert none[0].get_height() == pytest.approx(40)
    assert none[0].get_x() > bars[-1].get_x() + bars[-1].get_width()


def test_pictures_hold_no_colour_but_grey(tmp_path: Path) -> None:
    colours = set(re.findall("#([0-9a-f]{6})", picture(tmp_path, full_profile())))
    assert len(colours) > 3
    assert [colour for colour in colours if len({colour[:2], colour[2:4], colour[4:]}) > 1] == []
    plot_profile(full_profile(), tmp_path / "picture.png")
    pixels = imread(tmp_path / "picture.png")
    assert (pixels[..., 0] == pixels[..., 1]).all()
    assert (pixels[..., 0] == pixels[..., 2]).all()


@pytest.mark.parametrize(
    "overrides",
    [
        *({"threshold": 9.0}, {"threshold": -1.0}, {"cold_s": 0, "cold_e": 6}, {"id": "org/$x$_{"}),
        *({"mean": [1.0] * 6}, {"mean": [-0.9] * 6}),
        {"curve": [[0.5, 0.0, -1e-7]], "measured": None},
        {"curve": [[0.5, 0.0, 0.0], [0.5000000000000001, 1.0, 9.9]]},
        {"measured": {**MEASURED, "kl": 0.0, "skip_ratio": 0.0, "first_skipped": [0.0] * 6}},
    ],
)
def test_unusual_profiles_can_be_drawn(tmp_path: Path, overrides: dict[str, Any]) -> None:
    parts = {"measured": MEASURED, "curve": CURVE, **overrides}
    plot_profile(profile_with_curve(parts.pop("mean", MEAN), **parts), tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 0


TOO_LARGE = {"curve": [[0.5, 0.1, -1.7e308]]}


@pytest.mark.parametrize(
    ("profile", "file", "panels", "sentence"),
    [
        (full_profile(), "c.jpg", [], r"name a file that ends with \.png, \.svg, \.pdf or \.html"),
        (make_profile(), "c.png", [], "nothing to plot"),
        (full_profile(curve=[]), "c.png", ["similarity", "kl"], "no data for the panel kl"),
        (full_profile(), "c.png", ["speed"], "no panel is called 'speed': choose from similarity, ratio, kl, first-"),
        (full_profile(**TOO_LARGE), "c.png", [], r"too large to draw, -1\.7e\+308"),
        (full_profile(), "/dev/null/c.png", [], r"cannot write \S+c\.png \((File exists|Not a directory)\)"),
    ],
)
def test_what_cannot_be_drawn_is_a_sentence(
    tmp_path: Path, profile: Profile, file: str, panels: list[str], sentence: str
) -> None:
    with pytest.raises(FfnskipError, match=sentence):
        plot_profile(profile, tmp_path / file, panels)
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib_its_name_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(FfnskipError, match=r"matplotlib"):
        plot_profile(full_profile(), tmp_path / "curve.png")


def test_a_page_holds_figures_and_verdict_as_text_never_as_markup_and_refers_to_nothing_outside(tmp_path: Path) -> None:
    html = picture(tmp_path, full_profile(), suffix=".html")
    sentences = [f"<li>{escape(sentence)}</li>" for sentence in explain(full_profile())]
    for content in ("<h1>Skip profile of org/tiny</h1>", "<svg", "± 0.0100", "<td>24.00%</td>", *sentences):
        assert content in html
    assert html.rindex("</li>") < html.index("<svg")
    namespaces = {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert set(re.findall(r"https?://[^\"'\s<]+", html)) <= namespaces
    assert not re.search(r"<script|<link|<img|@import|url\((?!#)|<\?xml|<!DOCTYPE svg", html)
    assert "prefers-color-scheme: dark" in html
    html = picture(tmp_path, full_profile(id="org/<script>&"), suffix=".html")
    assert "<script" not in html
    assert "org/&lt;script&gt;&amp;" in html
    assert "Verdict: within the quality budget &lt;of all&gt;" in html
    assert "<table" not in picture(tmp_path, full_profile(measured=None), suffix=".html")


def test_a_page_has_tables_of_what_was_searched_and_of_the_fit(tmp_path: Path) -> None:
    tried = {"cold_s": 1, "cold_e": 5, "window": None, "refresh_every": None, "kl": 0.2, "standard_error": 0.0}
    search = {"ratio": 0.1, "tokens": 64, "candidates": [tried]}
    fit = {"tokens": 4096, "text_sha256": "c" * 64, "gradient_tokens": 512, "ridge": 0.001, "ratio": 0.25}
    profile = damage_profile(measured=MEASURED, curve=NATS, search=search, fit={**fit, "kl": [0.09, 0.05]})
    html = picture(tmp_path, profile, suffix=".html")
    for first, *cells in (
        ("[1, 5)", "–", "–", "0.2000", "0.0000", "chosen"),
        ("kl (dense fit)", "0.0900"),
        ("kl (refit 1)", "0.0500"),
    ):
        row = "".join(f"<td[^>]*>{re.escape(cell)}</td>" for cell in cells)
        assert re.search(f'<tr><th scope="row">{re.escape(first)}</th>{row}</tr>', html)


@pytest.mark.parametrize("goal", [{"max_kl": 0.25}, {"max_perplexity_increase": 0.05}])
@pytest.mark.parametrize("suffix", [".svg", ".html"])
def test_a_profile_with_another_goal_than_a_ratio_is_drawn_alike(
    tmp_path: Path, goal: dict[str, float], suffix: str
) -> None:
    content = picture(tmp_path, full_profile(measured={**MEASURED, "target_ratio": None, **goal}), suffix=suffix)
    assert [title for title in TITLES.values() if title not in content] == []
    assert ('<th scope="row">target_ratio</th>' in content, next(iter(goal)) in content) == (False, suffix == ".html")
