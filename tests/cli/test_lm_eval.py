"""lm-eval with a profile on, and `ffnskip eval`: their figures are those of the model as one would run it oneself."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support.cli import mistake, succeed
from support.on_disk import bytes_as_tokens
from transformers import AutoModelForCausalLM

import ffnskip

pytest.importorskip("lm_eval")

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from ffnskip_cli.lm_eval import FfnskipLM, main

# The byte ! is token 0, which is also what lm-eval pads with.
TEXTS = [("which of them is it", [" ab!!x", " b!", " a longer one of the choices"]), ("and now", [" ab", " c!!!!"])]
PROMPTS = ["once upon a time", "abc def gh", "a"]
TASKS = {
    "choose": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": 0,
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    },
    "write": {
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{text}}",
        "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 12, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both tasks and their data."""
    folder = tmp_path_factory.mktemp("tasks")
    documents = {
        "choose": [{"text": text, "choices": choices} for text, choices in TEXTS],
        "write": [{"text": text} for text in PROMPTS],
    }
    for name, settings in TASKS.items():
        data = folder / f"{name}.jsonl"
        data.write_text("\n".join(map(json.dumps, documents[name])))
        source = {"dataset_path": "json", "dataset_kwargs": {"data_files": str(data)}, "test_split": "train"}
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name, **source, **settings}))  # JSON is YAML
    again = {"include": "choose.yaml", "task": "choose_again", "doc_to_target": 1}
    (folder / "choose_again.yaml").write_text(json.dumps(again))
    both = {"group": "both", "task": ["choose", "choose_again"], "aggregate_metric_list": [{"metric": "acc"}]}
    (folder / "both.yaml").write_text(json.dumps(both))
    return folder


@pytest.fixture
def none_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the thousands of tasks that lm-eval brings and looks through, none is there: that takes it ten seconds."""
    (tmp_path / "lm_eval").mkdir()
    monkeypatch.setattr("lm_eval.tasks.manager.__file__", str(tmp_path / "lm_eval" / "manager.py"))


@pytest.fixture(scope="module")
def profile(plateau_profiles: Path) -> Path:
    return plateau_profiles / "0.30.yaml"


def evaluate(tasks: Path, name: str, batch_size: int, model: str = "ffnskip", **arguments: Any) -> dict[str, Any]:
    results: dict[str, Any] = simple_evaluate(
        model=model,
        model_args={name: str(value) if isinstance(value, Path) else value for name, value in arguments.items()},
        tasks=[name],
        batch_size=batch_size,
        device="cpu",
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0,
    )
    return results


def answers(results: dict[str, Any], name: str) -> list[Any]:
    """What the model was found to say, in the order of the documents."""
    samples = sorted(results["samples"][name], key=lambda sample: int(sample["doc_id"]))
    return [response[0] for sample in samples for response in sample["resps"]]


@pytest.mark.parametrize("batch_size", [1, 8])
def test_log_likelihoods_and_counts_are_those_of_a_pass_in_score_mode(
    plateau_folder: Path, profile: Path, tasks: Path, batch_size: int
) -> None:
    results = evaluate(tasks, "choose", batch_size, pretrained=plateau_folder, profile=profile)
    tokenizer, expected = bytes_as_tokens(), []
    model = AutoModelForCausalLM.from_pretrained(plateau_folder)
    with ffnskip.apply(model, profile, mode="score") as applied, torch.inference_mode():
        for context, choices in TEXTS:
            for choice in choices:
                tokens = tokenizer(context + choice, return_tensors="pt")["input_ids"]
                logits = model(tokens[:, :-1]).logits.log_softmax(-1)
                expected.append(float(logits[0].gather(1, tokens[0, 1:, None])[-len(choice) :].sum()))
    assert [score for score, _ in answers(results, "choose")] == pytest.approx(expected, rel=1e-5)
    assert applied.stats.skip_ratio > 0.1
    found = results["config"]["ffnskip"]
    assert found["tokens_past_warm_up"] == applied.stats.tokens
    assert found["warm_up_tokens"] == applied.stats.warm_up_tokens
    assert found["skip_ratio"] == applied.stats.skip_ratio
    assert found["never_skip_fraction"] == applied.stats.never_skip_fraction


@pytest.mark.parametrize("batch_size", [1, 8])
def test_what_is_generated_is_what_the_decoder_generates(
    plateau_folder: Path, profile: Path, tasks: Path, batch_size: int
) -> None:
    results = evaluate(tasks, "write", batch_size, pretrained=plateau_folder, profile=profile)
    tokenizer, expected = bytes_as_tokens(), []
    decoder = ffnskip.Decoder(AutoModelForCausalLM.from_pretrained(plateau_folder), profile)
    for prompt in PROMPTS:
        tokens = tokenizer(prompt, return_tensors="pt")["input_ids"]
        new = [int(token) for token in decoder.decode(tokens, max_new_tokens=12, stop_tokens={257})]
        expected.append(tokenizer.decode(new, skip_special_tokens=True).split("\n\n")[0])
    assert answers(results, "write") == expected
    assert results["config"]["ffnskip"]["tokens_past_warm_up"] == decoder.stats.tokens > 0
    assert results["config"]["ffnskip"]["skip_ratio"] == decoder.stats.skip_ratio


def test_where_nothing_may_skip_every_figure_is_that_of_the_dense_model(
    plateau_folder: Path, profile: Path, tasks: Path
) -> None:
    never = evaluate(tasks, "choose", 8, pretrained=plateau_folder, profile=profile, threshold=2.0)
    dense = evaluate(tasks, "choose", 8, model="hf", pretrained=plateau_folder)
    assert answers(never, "choose") == answers(dense, "choose")


def test_finding_a_batch_size_counts_nothing(plateau_folder: Path, profile: Path, tasks: Path) -> None:
    fixed = evaluate(tasks, "choose", 8, pretrained=plateau_folder, profile=profile)["config"]["ffnskip"]
    model = {"pretrained": plateau_folder, "profile": profile, "max_batch_size": 4, "max_length": 64}
    found = evaluate(tasks, "choose", "auto", **model)["config"]["ffnskip"]  # type: ignore[arg-type]
    assert found == fixed


def test_scores_in_decode_mode_say_that_nothing_was_skipped(plateau_folder: Path, profile: Path, tasks: Path) -> None:
    model = FfnskipLM(str(plateau_folder), profile, mode="decode", device="cpu")
    simple_evaluate(
        model=model,
        tasks=["choose"],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0,
    )
    with pytest.warns(ffnskip.FfnskipWarning, match="were prompt"):
        model.applied.remove()


def test_mistakes_are_found_before_weights_are_loaded(profile: Path) -> None:
    with pytest.raises(ffnskip.FfnskipError, match="needs profile=FILE"):
        FfnskipLM("none")
    with pytest.raises(ffnskip.FfnskipError, match="score"):
        FfnskipLM("none", profile, mode="prompt")  # type: ignore[arg-type]
    with pytest.raises(ffnskip.FfnskipError, match="not both"):
        FfnskipLM("none", profile, threshold=0.9, target=0.1)


@pytest.mark.usefixtures("none_of_its_own")
def test_the_command_line_of_lm_eval_knows_the_model_and_says_mistakes_in_one_sentence(
    plateau_folder: Path,
    profile: Path,
    tasks: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As a program of its own it is run with the page on integrations."""

    def lm_eval(arguments: str) -> None:
        shared = ["--tasks", "choose", "--include_path", str(tasks), "--device", "cpu", "--batch_size", "2"]
        command = ["lm_eval", "--model", "ffnskip", "--model_args", arguments, "--output_path", str(tmp_path)]
        monkeypatch.setattr("sys.argv", [*command, *shared])
        main()

    lm_eval(f"pretrained={plateau_folder},profile={profile}")
    said = capsys.readouterr()
    assert "|choose|" in said.out
    assert "skip_ratio 0." in said.err
    (saved,) = tmp_path.rglob("results*.json")
    assert json.loads(saved.read_text())["config"]["ffnskip"]["skip_ratio"] > 0.0
    with pytest.raises(SystemExit, match="2"):
        lm_eval(f"pretrained={plateau_folder},profile={tmp_path / 'none.yaml'}")
    assert capsys.readouterr().err.splitlines()[-1].startswith("Error: ")


def test_eval_puts_dense_and_profile_side_by_side(
    plateau_folder: Path, profile: Path, tasks: Path, tmp_path: Path
) -> None:
    command = ("eval", plateau_folder, "--profile", profile, "--tasks", "choose,write", "--include-path", tasks)
    result = succeed(*command, "--batch-size", 8, "--format", "json", "--output", tmp_path / "out.json")
    document = json.loads(result.stdout)
    assert document == json.loads((tmp_path / "out.json").read_text())
    rows = {(row["task"], row["metric"]): row for row in document["rows"]}
    assert set(rows) == {("choose", "acc"), ("write", "exact_match")}
    for model, column in (("hf", "dense"), ("ffnskip", "ffnskip")):
        given = {"pretrained": plateau_folder} | ({"profile": profile} if model == "ffnskip" else {})
        figures = evaluate(tasks, "choose", 8, model=model, **given)["results"]["choose"]
        assert rows["choose", "acc"][column] == figures["acc,none"]
    for row in rows.values():
        assert row["difference"] == row["ffnskip"] - row["dense"]
        assert row["difference_stderr"] is not None
    assert {row["task"] for row in document["writing"]} == {"write"}  # a choice is no text
    assert document["skip_ratio"] > 0.1
    table = succeed(*command, "--limit", 1).stdout
    assert "skip_ratio 0." in table
    assert table.splitlines()[0].split()[:2] == ["task", "metric"]


def test_a_groups_row_is_the_mean_of_its_tasks(plateau_folder: Path, profile: Path, tasks: Path) -> None:
    command = ("eval", plateau_folder, "--profile", profile, "--tasks", "both", "--include-path", tasks)
    document = json.loads(succeed(*command, "--format", "json").stdout)
    rows = {row["task"]: row for row in document["rows"]}
    parts = [rows["choose"], rows["choose_again"]]
    for column in ("dense", "ffnskip", "difference"):
        assert rows["both"][column] == pytest.approx(sum(part[column] for part in parts) / 2)
        errors = [part[f"{column}_stderr"] for part in parts]
        assert rows["both"][f"{column}_stderr"] == pytest.approx(math.hypot(*errors) / 2)


@pytest.mark.usefixtures("none_of_its_own")
def test_eval_refuses_what_it_cannot_run(plateau_folder: Path, profile: Path, tasks: Path, tmp_path: Path) -> None:
    command = ("eval", plateau_folder, "--profile", profile, "--include-path", tasks)
    assert "no task nothing" in mistake(*command, "--tasks", "choose,nothing")
    assert "--batch-size" in mistake(*command, "--tasks", "choose", "--batch-size", "many")
    (tmp_path / "broken.yaml").write_text((tasks / "choose.yaml").read_text().replace(".jsonl", ".none"))
    broken = ("eval", plateau_folder, "--profile", profile, "--include-path", tmp_path, "--tasks", "choose")
    assert "cannot be loaded" in mistake(*broken)
