"""`ffnskip generate`."""

import shutil
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.cli import mistake, succeed, talk
from support.pico import pico_model
from transformers import AutoTokenizer

from ffnskip.profiles.evidence import CurvePoint
from ffnskip.profiles.profile import load_profile, save_profile
from ffnskip_cli.budget import MAX_KL
from ffnskip_cli.commands import generate_run

PROMPT = "a cab had"


@pytest.fixture(scope="session")
def chat_folder(plateau_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with a chat template."""
    folder = Path(shutil.copytree(plateau_folder, tmp_path_factory.mktemp("models") / "chat"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    return folder


def generated(*arguments: object, new_tokens: int = 24) -> str:
    return succeed("generate", *arguments, "--max-new-tokens", new_tokens).stdout


def test_text_goes_to_stdout_and_figures_to_stderr(plateau_folder: Path, plateau_profiles: Path) -> None:
    dense = succeed("generate", plateau_folder, "-", "--max-new-tokens", 24, stdin=PROMPT)
    assert dense.stdout == generated(plateau_folder, PROMPT)
    assert talk(dense)[0].startswith("dense: 24 tokens, ")
    assert "skip_ratio" not in dense.stderr
    options = ("--profile", plateau_profiles / "0.05.yaml", "--threshold", -1)
    skipping = succeed("generate", plateau_folder, PROMPT, *options, "--max-new-tokens", 24)
    assert skipping.stdout not in (dense.stdout, "\n")
    assert skipping.stdout.endswith("\n")
    (figures,) = talk(skipping)
    assert figures.startswith("ffnskip: 24 tokens, ")
    assert "skip_ratio 0." in figures
    assert "never_skip_fraction " in figures
    (figures,) = talk(succeed("generate", plateau_folder, PROMPT, *options, "--max-new-tokens", 3))
    assert figures.endswith("all of them warm-up: nothing could be skipped yet")


def test_options_that_leave_the_dense_text_as_it_is(plateau_folder: Path, plateau_profiles: Path) -> None:
    for options in (
        ("--profile", plateau_profiles / "0.05.yaml", "--threshold", 2),  # which nothing reaches
        ("--raw",),  # the model has no template
        ("--temperature", 1, "--top-p", 1e-9),  # the likeliest token alone
    ):
        assert generated(plateau_folder, PROMPT, *options) == generated(plateau_folder, PROMPT)


def test_threads_are_those_asked_for(plateau_folder: Path) -> None:
    before, text = torch.get_num_threads(), generated(plateau_folder, PROMPT)
    try:
        assert generated(plateau_folder, PROMPT, "--threads", 3) == text
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_packed_weights_decode_with_a_profile_and_without(plateau_folder: Path, plateau_profiles: Path) -> None:
    arguments = (plateau_folder, PROMPT, "--weights", "int8", "--max-new-tokens", 24)
    assert talk(succeed("generate", *arguments))[-1].startswith("dense: 24 tokens, ")
    result = succeed("generate", *arguments, "--profile", plateau_profiles / "0.30.yaml")
    assert "skip_ratio 0." in result.stderr
    assert "Packing weights to int8" in result.stderr


def test_a_model_that_decodes_slower_than_others_says_why(tmp_path: Path, plateau_folder: Path) -> None:
    folder = Path(shutil.copytree(plateau_folder, tmp_path / "gpt2"))
    pico_model("gpt2", vocab_size=258).save_pretrained(folder)
    reason, figures = talk(succeed("generate", folder, PROMPT, "--max-new-tokens", 4))
    assert reason == "Decoding by the general path: Models of type 'gpt2' have no fused decode step."
    assert figures.startswith("dense: 4 tokens, ")


def test_compare_shows_both_texts_side_by_side(plateau_folder: Path, plateau_profiles: Path) -> None:
    arguments = (plateau_folder, PROMPT, "--profile", plateau_profiles / "0.30.yaml")
    result = succeed("generate", *arguments, "--compare", "--max-new-tokens", 24)
    assert [line.split(":")[0] for line in talk(result)] == ["Warning", "ffnskip", "dense"]
    cells = [line.split("│")[1:3] for line in result.stdout.split("\n") if line.startswith("│")]
    dense, skipping = ("".join("".join(column).split()) for column in zip(*cells, strict=True))
    assert dense != skipping
    assert dense == "".join(generated(plateau_folder, PROMPT).split())
    assert skipping == "".join(generated(*arguments).split())


@pytest.mark.parametrize(
    ("tokens", "seconds", "told"),
    [(40, 2.0, True), (40, 1.0, False), (40, 0.5, False), (31, 2.0, False)],  # the last is too short to tell
)
def test_compare_tells_of_a_profile_that_is_slower_than_dense(
    plateau_folder: Path,
    plateau_profiles: Path,
    tokens: int,
    seconds: float,
    told: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    steps = [seconds] * tokens + [1.0] * tokens  # the profile's answer comes first
    clock = SimpleNamespace(perf_counter=accumulate(steps).__next__)
    monkeypatch.setattr(generate_run, "time", clock)
    arguments = (plateau_folder, PROMPT, "--profile", plateau_profiles / "0.05.yaml", "--max-new-tokens", tokens)
    said = talk(succeed("generate", *arguments, "--compare"))
    assert [line for line in said if line.startswith("Warning")] == told * [
        "Warning: In this answer decoding with the profile is slower than dense (0.5 against 1.0 tokens/s): it skips "
        "too little there to pay for what it adds."
    ]


def test_a_chat_model_gets_its_template_unless_raw(chat_folder: Path) -> None:
    chat = generated(chat_folder, PROMPT)
    raw = generated(chat_folder, PROMPT, "--raw")
    assert chat == generated(chat_folder, f"user: {PROMPT}\nassistant:", "--raw")
    assert chat != raw


def test_a_seed_repeats_a_sample(plateau_folder: Path, plateau_profiles: Path) -> None:
    sampled = (plateau_folder, PROMPT, "--temperature", 1, "--profile", plateau_profiles / "0.05.yaml", "--seed")
    assert generated(*sampled, 1) == generated(*sampled, 1)
    assert generated(*sampled, 1) != generated(*sampled, 2)


def test_a_target_moves_along_the_curve_and_says_what_it_should_cost(
    plateau_folder: Path, plateau_profiles: Path
) -> None:
    path = plateau_profiles / "0.05.yaml"
    for point in (point for point in load_profile(path).curve if point.kl <= MAX_KL):
        arguments = (plateau_folder, PROMPT, "--profile", path, "--max-new-tokens", 24)
        moved = succeed("generate", *arguments, "--target", point.skip_ratio)
        assert moved.stdout == generated(*arguments, "--threshold", point.threshold)
        expected, figures = talk(moved)
        assert expected == (
            f"At ratio {point.skip_ratio:g} the profile should cost KL {point.kl:.3f} nats per token, by its curve, "
            "which knows KL alone."
        )
        assert figures.startswith("ffnskip: ")


@pytest.mark.parametrize("own_target", ["0.05", "0.30"])
def test_a_target_whose_kl_is_over_budget_is_warned_of(
    plateau_folder: Path, plateau_profiles: Path, tmp_path: Path, own_target: str
) -> None:
    profile = load_profile(plateau_profiles / f"{own_target}.yaml")
    curve = (CurvePoint(0.99, 0.1, MAX_KL - 0.01), CurvePoint(0.9, 0.3, MAX_KL + 0.03))
    save_profile(profile.model_copy(update={"curve": curve}), tmp_path / "p.yaml")
    options = ("--profile", tmp_path / "p.yaml", "--target", 0.2, "--max-new-tokens", 3)
    warning, _ = talk(succeed("generate", plateau_folder, PROMPT, *options))
    assert warning == (
        "Warning: At ratio 0.2 this profile is over the quality budget: by its curve KL 0.060 is over 0.050 nats per "
        "token."
    )


def test_a_verdict_over_budget_is_repeated_and_holds_for_higher_targets_too(
    plateau_folder: Path, plateau_profiles: Path
) -> None:
    path = plateau_profiles / "0.30.yaml"
    measured = load_profile(path).measured
    arguments = ("generate", plateau_folder, PROMPT, "--profile", path, "--max-new-tokens", 3)
    assert talk(succeed(*arguments))[:-1] == [f"Warning: This profile is {measured.verdict}."]
    _, warning, _ = talk(succeed(*arguments, "--target", measured.skip_ratio))
    assert warning == f"Warning: Already at ratio {measured.skip_ratio:g} this profile is {measured.verdict}."
    assert "Warning" not in succeed(*arguments, "--target", measured.skip_ratio / 2).stderr


def test_a_target_beyond_the_curve_is_refused_before_the_model_is_loaded(plateau_profiles: Path) -> None:
    arguments = ("generate", "no/such-model", PROMPT, "--profile", plateau_profiles / "0.05.yaml")
    assert mistake(*arguments, "--target", 0.9).endswith("not to 0.9: calibrate for that target instead.")
    assert mistake(*arguments, "--target", "nan") == "The target ratio must be a finite number, not nan."
    both = ("--target", 0.1, "--threshold", 0.9)
    assert mistake(*arguments, *both) == "Give a threshold or a target, not both."


@pytest.mark.parametrize(
    ("prompt", "options", "words"),
    [
        ("", [], "The prompt is empty."),
        ("-", [], "The prompt is empty."),
        (PROMPT, ["--compare"], "--compare needs a --profile"),
        (PROMPT, ["--threshold", "0.9"], "--threshold needs a --profile"),
        (PROMPT, ["--target", "0.1"], "--target needs a --profile"),
        (PROMPT, ["--profile", "missing.yaml"], "missing.yaml: cannot be read"),
        (PROMPT, ["--max-new-tokens", "510"], "The model takes at most 512 tokens, but this needs 519"),
        (PROMPT, ["--temperature", "1e-30"], "The temperature must be 0 (greedy), or finite and at least 0.0001"),
        (PROMPT, ["--temperature", "inf"], "The temperature must be 0 (greedy), or finite and at least 0.0001"),
        (PROMPT, ["--temperature", "1", "--top-p", "0"], "top_p must be more than 0"),
        (PROMPT, ["--dtype", "int4"], "unknown dtype 'int4'"),
        (PROMPT, ["--device", "toaster"], "device 'toaster' cannot be used here"),
        (PROMPT, ["--revision", "main"], "a revision goes only with a Hub id"),
    ],
)
def test_wrong_arguments(plateau_folder: Path, prompt: str, options: list[str], words: str) -> None:
    assert words in mistake("generate", plateau_folder, prompt, *options, stdin="")


def test_a_prompt_that_is_not_text_or_a_profile_for_another_model(
    plateau_folder: Path, plateau_profiles: Path, pico_folder: Path
) -> None:
    assert mistake("generate", plateau_folder, "-", stdin=b"caf\xe9") == "The prompt is not UTF-8 text."
    surrogate = b"caf\xe9".decode(errors="surrogateescape")
    assert mistake("generate", plateau_folder, surrogate) == "The prompt is not UTF-8 text."
    profile = ("--profile", plateau_profiles / "0.30.yaml")
    assert "model.n_layers is 8" in mistake("generate", pico_folder, "a", *profile, "--max-new-tokens", 3)
    assert "finite" in mistake("generate", plateau_folder, PROMPT, *profile, "--threshold", "nan")
