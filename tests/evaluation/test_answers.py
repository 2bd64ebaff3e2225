"""Answers that are kept as they come, and taken by nobody but who gave them."""

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance
from support.on_disk import bytes_as_tokens
from transformers import AutoModelForCausalLM

from ffnskip_cli.evaluation.answers import Answers, DenseLM, SkippingLM
from ffnskip_cli.evaluation.conversations import hold, pairs

SUBJECT = {"weights": "a", "dtype": "float32", "profile": None}
GREEDY = {"until": [], "max_gen_toks": 12, "do_sample": False}


def written(prompts: Sequence[str], settings: dict[str, Any] = GREEDY) -> list[Instance]:
    return [Instance("generate_until", {}, (prompt, settings), i) for i, prompt in enumerate(prompts)]


def scored(prompts: Sequence[str]) -> list[Instance]:
    return [Instance("loglikelihood", {}, (prompt, " ab"), i) for i, prompt in enumerate(prompts)]


@pytest.fixture
def dense(plateau_folder: Path) -> DenseLM:
    model = AutoModelForCausalLM.from_pretrained(plateau_folder)
    return DenseLM(pretrained=model, tokenizer=bytes_as_tokens(), batch_size=1)


def count_asked(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The passes that the model runs from now on."""
    passes: list[str] = []
    for name in ("_model_generate", "_model_call"):
        own = getattr(model, name)

        def counted(*args: Any, own: Any = own, name: str = name, **kwargs: Any) -> Any:
            passes.append(name)
            return own(*args, **kwargs)

        monkeypatch.setattr(model, name, counted)
    return passes


def test_an_eval_that_was_killed_asks_only_for_what_it_lacks(
    dense: DenseLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = ["once upon a time", "abc def gh", "a"]
    whole = dense
    whole.keep(Answers(tmp_path / "whole", "dense", SUBJECT))
    expected = whole.generate_until(written(prompts)), whole.loglikelihood(scored(prompts))
    answers = Answers(tmp_path, "dense", SUBJECT)
    dense.keep(answers)
    dense.generate_until(written(prompts[:2]))
    dense.loglikelihood(scored(prompts[:1]))
    with answers.path.open("a") as file:
        file.write('\n["cut sho')  # by a kill
    again = Answers(tmp_path, "dense", SUBJECT)
    dense.keep(again)
    passes = count_asked(dense, monkeypatch)
    assert (dense.generate_until(written(prompts)), dense.loglikelihood(scored(prompts))) == expected
    assert passes == ["_model_generate", "_model_call", "_model_call"]
    assert again.taken == 3
    assert again.path == answers.path


def test_every_answer_is_in_the_file_before_the_next_is_asked_for(dense: DenseLM, tmp_path: Path) -> None:
    answers = Answers(tmp_path, "dense", SUBJECT)
    dense.keep(answers)
    seen: list[int] = []
    own = dense._model_generate

    def look(*args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append(sum("generate_until" in line for line in answers.path.read_text().splitlines()))
        tokens: torch.Tensor = own(*args, **kwargs)
        return tokens

    dense._model_generate = look  # type: ignore[method-assign]
    said = dense.generate_until(written(["abc", "de", "f"]))
    assert seen == [0, 1, 2]
    lines = [json.loads(line) for line in answers.path.read_text().splitlines() if line]
    kept = {entry["asked"][0]: entry["answer"] for _, entry, _ in lines if "asked" in entry}
    assert [kept[prompt] for prompt in ("abc", "de", "f")] == said


@pytest.mark.parametrize("other", [{"profile": ["x"]}, {"dtype": "bfloat16"}, {"weights": "b"}], ids=str)
def test_answers_of_another_eval_are_kept_apart(dense: DenseLM, tmp_path: Path, other: dict[str, Any]) -> None:
    dense.keep(Answers(tmp_path, "dense", SUBJECT))
    dense.generate_until(written(["abc"]))
    answers = Answers(tmp_path, "dense", SUBJECT | other)
    dense.keep(answers)
    dense.generate_until(written(["abc"]))
    assert answers.taken == 0
    assert len(list(tmp_path.glob("dense-*.jsonl"))) == 2
    answers.path.write_bytes(Answers(tmp_path, "dense", SUBJECT).path.read_bytes())  # by hand
    dense.keep(Answers(tmp_path, "dense", SUBJECT | other))
    dense.generate_until(written(["abc"]))
    assert dense.answers.taken == 0


def test_other_settings_are_another_question_and_samples_are_drawn_anew(dense: DenseLM, tmp_path: Path) -> None:
    answers = Answers(tmp_path, "dense", SUBJECT)
    dense.keep(answers)
    sampled = {**GREEDY, "do_sample": True, "temperature": 1.0}
    for settings in (GREEDY, {**GREEDY, "max_gen_toks": 8}, sampled, sampled):
        dense.generate_until(written(["abc"], settings))
    assert answers.taken == 0
    dense.generate_until(written(["abc"]))
    assert answers.taken == 1


def test_what_was_skipped_for_kept_answers_counts(plateau_folder: Path, plateau_profiles: Path, tmp_path: Path) -> None:
    def counts(folder: Path, *parts: Sequence[str]) -> tuple[int, int, float]:
        for prompts in parts:
            model = AutoModelForCausalLM.from_pretrained(plateau_folder)
            profile = plateau_profiles / "0.30.yaml"
            skipping = SkippingLM(pretrained=model, tokenizer=bytes_as_tokens(), profile=profile, batch_size=1)
            answers = Answers(folder, "profile", SUBJECT | {"profile": "x"})
            skipping.keep(answers)
            with skipping.applied as applied:
                skipping.generate_until(written(prompts))
                answers.settle()
        return applied.stats.tokens, applied.stats.warm_up_tokens, applied.stats.skip_ratio

    prompts = ["once upon a time", "abc def gh", "a"]
    at_once = counts(tmp_path / "a", prompts)
    assert at_once[0] > 0
    assert counts(tmp_path / "b", prompts[:2], prompts, prompts) == at_once


def test_the_second_turn_is_asked_with_the_models_own_first_answer(dense: DenseLM, tmp_path: Path) -> None:
    dense.tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    dense.keep(Answers(tmp_path, "dense", SUBJECT))
    questions = [{"turns": ["one?", "two?"], "category": "", "reference": ["1"]}]
    ((first, second),) = hold(dense, questions, most_tokens=8)
    prompt = f"<user>one?<assistant>{first}<user>two?<assistant>"
    (alone,) = dense.generate_until(written([prompt], GREEDY | {"max_gen_toks": 8}))
    assert alone.strip() == second
    assert dense.answers.taken == 1
    one, two = pairs(questions, [(first, second)], [("x", "y")])
    assert (one.part, one.prompt, one.expected, one.dense, one.ffnskip) == ("turn 1", "one?", "1", first, "x")
    assert (two.part, two.prompt, two.expected, two.dense, two.ffnskip) == ("turn 2", "two?", "", second, "y")


def test_a_model_without_a_chat_template_is_refused() -> None:
    from ffnskip.errors import FfnskipError

    model: Any = SimpleNamespace(tokenizer=SimpleNamespace(chat_template=None))
    with pytest.raises(FfnskipError, match="chat template"):
        hold(model, [])
