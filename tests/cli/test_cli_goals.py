"""What `ffnskip calibrate` aims for, what it chooses by itself, and what it says of the result."""

import html
from pathlib import Path

import pytest
from support.cli import SMALL, mistake, succeed, talk

from ffnskip.profiles.profile import load_profile
from ffnskip_cli.report.plot import TITLES
from ffnskip_cli.report.words import explain


@pytest.mark.parametrize(
    ("goal", "name", "field", "limit"),
    [
        (("--max-kl", "0.01"), "kl-0.01.yaml", "max_kl", 0.01),
        (("--max-perplexity-increase", "2%"), "perplexity-2pct.yaml", "max_perplexity_increase", 0.02),
    ],
)
def test_a_limit_on_quality_holds_on_unseen_text(
    calibrate: tuple[object, ...], tmp_path: Path, goal: tuple[str, str], name: str, field: str, limit: float
) -> None:
    succeed(*calibrate, *goal, "--output", tmp_path)
    measured = load_profile(tmp_path / name).measured
    costs = {"max_kl": measured.kl, "max_perplexity_increase": measured.perplexity / measured.perplexity_dense - 1}
    assert costs[field] <= limit + 1e-4  # written with five digits
    assert measured.skip_ratio > 0
    goals = measured.model_dump(include={"target_ratio", *costs})
    assert goals == {"target_ratio": None, "max_kl": None, "max_perplexity_increase": None} | {field: limit}


@pytest.mark.parametrize(
    ("goal", "words"),
    [
        ((), "exactly one of --target, --target-flops, --max-kl"),
        (("--target", "0.1", "--max-kl", "0.1"), "exactly one of --target, --target-flops, --max-kl"),
        (("--max-kl", "-1"), "The limit -1 is not a number above 0"),
        (("--max-kl", "inf"), "The limit inf is not a number above 0"),
        (("--max-kl", "2%"), "--max-kl 2% is not a limit such as 0.05: leave the % out"),
        (("--max-perplexity-increase", "two"), "is not a limit such as 2%, or several with commas between"),
        (("--max-perplexity-increase", "0.02"), "lacks its unit: write 2% for two per cent"),
        (("--target", "10%"), "--target 10% is not a ratio such as 0.10: leave the % out"),
        (("--max-kl", "0.1,0.1"), "names a limit twice"),
        (("--target", "0.1", "--window", "0"), "--window must be a whole number from 1 on, none or auto, not 0"),
        (("--target", "0.1", "--warm-up", "none"), "--warm-up must be a whole number from 0 on, auto, not none"),
        (("--target", "0.1", "--refresh-every", "1"), "--refresh-every must be a whole number from 2 on"),
        (("--target", "0.1,0.2", "--plot", "a.png"), "--plot draws one profile"),
        (("--target", "0.1", "--plot", "a.jpg"), "cannot plot to a.jpg"),
        (("--target", "0.1234561,0.1234562"), "0.123456.yaml would be written over"),
        (("--target", "0.1", "--dataset", "demo=x"), "the weight 'x' of demo is not a number above 0"),
    ],
)
def test_goals_and_settings_that_are_none(
    plateau_folder: Path, tmp_path: Path, goal: tuple[str, ...], words: str
) -> None:
    assert words in mistake("calibrate", plateau_folder, *goal, "--output", tmp_path)


def test_one_command_gives_a_profile_a_picture_and_both_explained(
    calibrate: tuple[object, ...], tmp_path: Path
) -> None:
    path, picture = tmp_path / "own.yaml", tmp_path / "own.html"
    result = succeed(*calibrate, "--target", 0.1, "--output", path, "--plot", picture)
    sentences = explain(load_profile(path))
    assert set(sentences) <= set(result.stdout.splitlines())
    page = picture.read_text()
    assert "<svg" in page
    assert all(f"({letter}) {TITLES[name]}: " in page for letter, name in zip("abcd", TITLES, strict=True))
    assert html.escape(sentences[-1], quote=False) in page


def test_the_search_is_in_the_profile_and_pins_are_kept(calibrate: tuple[object, ...], tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    searching = ("--candidates", 6, "--warm-up", "auto", "--cold-s", 1)
    succeed(*calibrate, "--target", 0.1, "--output", path, *searching)
    profile = load_profile(path)
    assert profile.search.ratio == 0.1
    assert 1 < len(profile.search.candidates) <= 6
    assert {candidate.cold_s for candidate in profile.search.candidates} == {1}
    assert profile.skip.warm_up in [trial.warm_up for trial in profile.search.warm_up]
    pinned = ("--candidates", 6, "--warm-up", 4, "--window", "none", "--refresh-every", "none", "--cold-e", 6)
    succeed(*calibrate, "--target", 0.1, "--output", path, *pinned, "--cold-s", 2)
    assert load_profile(path).search is None


def test_several_texts_are_mixed_by_weight_and_how_far_the_ratio_moves_on_another_kind_is_said(
    plateau_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    other, path = tmp_path / "digits.txt", tmp_path / "own.yaml"
    other.write_text("\n".join(str(number**3) for number in range(9000)))
    command = ("calibrate", plateau_folder, "--dataset", f"{text_file}=3", "--target", 0.1, "--output", path, *SMALL)
    succeed(*command, "--dataset", other)
    profile = load_profile(path)
    for text, tokens in ((profile.calibration, 1024), (profile.evaluation, 512)):
        assert (text.dataset, text.tokens_used) == ("mixture", tokens)
        parts = [(part.dataset, part.weight, part.tokens_used) for part in text.parts]
        assert parts == [("log.txt", 3, tokens * 3 // 4), ("digits.txt", 1, tokens // 4)]
    said = talk(succeed(*command, "--eval-dataset", other))
    measured = load_profile(path).measured
    (sentence,) = [line for line in said if "the rule at work" in line]
    moved = f"{path} skips {measured.skip_ratio:.3f} ± {measured.standard_error['skip_ratio']:.3f} of the FFNs"
    assert sentence.startswith(f"{moved} on digits.txt, and 0.")
    assert "on log.txt, which it was calibrated on" in sentence
