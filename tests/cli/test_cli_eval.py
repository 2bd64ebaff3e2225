"""lm-eval with a profile on: by its own command line, and by `ffnskip eval`."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.cli import mistake, succeed
from support.on_disk import save_plateau
from support.pico import pico_profile
from transformers import AutoModelForCausalLM, AutoTokenizer

import ffnskip
from ffnskip import Decoder, FfnskipError

lm_eval = pytest.importorskip("lm_eval")
from lm_eval.tasks import TaskManager  # noqa: E402

from ffnskip_cli.lm_eval import FFNSkipLM  # noqa: E402

WORDS = ["a little fish swims", "two birds", "how many legs has a cat, and why", "x"]
TASK = """
dataset_path: json
dataset_kwargs: {data_files: FILE}
test_split: train
doc_to_text: "{{text}}"
"""
WRITE = "task: write\noutput_type: generate_until\ndoc_to_target: 'a'\n" + (
    "generation_kwargs: {until: ['zz'], max_gen_toks: 20, do_sample: false}\nmetric_list: [{metric: exact_match}]\n"
)
JUDGE = "task: judge\noutput_type: loglikelihood\ndoc_to_target: ' fish and more fish'\nmetric_list: [{metric: acc}]\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its profile, two tasks and their data."""
    folder = tmp_path_factory.mktemp("eval")
    model = AutoModelForCausalLM.from_pretrained(save_plateau(folder / "model"))
    ffnskip.save_profile(pico_profile(model, threshold=0.3, warm_up=4), folder / "p.yaml")
    (folder / "words.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in WORDS))
    for name, task in (("write", WRITE), ("judge", JUDGE)):
        (folder / f"{name}.yaml").write_text(task + TASK.replace("FILE", str(folder / "words.jsonl")))
    return folder


def answers(folder: Path, task: str, batch_size: int) -> tuple[list[Any], FFNSkipLM]:
    model = FFNSkipLM(str(folder / "model"), profile=str(folder / "p.yaml"), batch_size=batch_size, device="cpu")
    results = lm_eval.simple_evaluate(model, tasks=[task], task_manager=TaskManager(include_path=str(folder)))
    return [sample["resps"][0][0] for sample in results["samples"][task]], model


@pytest.mark.parametrize("batch_size", [1, 3])
def test_what_it_judges_skips_from_the_warm_up_on(folder: Path, batch_size: int) -> None:
    found, lm = answers(folder, "judge", batch_size)
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder / "model"),
        AutoTokenizer.from_pretrained(folder / "model"),
    )
    with ffnskip.apply(model, folder / "p.yaml", mode="score") as applied, torch.no_grad():
        for text, (likelihood, _) in zip(WORDS, found, strict=True):
            ids = tokenizer(text + " fish and more fish", return_tensors="pt")["input_ids"]
            scores = model(ids[:, :-1]).logits.log_softmax(-1)[0].gather(1, ids[0, 1:, None])[-19:]
            assert float(likelihood) == pytest.approx(float(scores.sum()), abs=1e-3)
    if batch_size == 1:
        assert lm.skipped()["skip_ratio"] == pytest.approx(applied.stats.skip_ratio)
    assert lm.skipped()["skip_ratio"] > 0


@pytest.mark.parametrize("batch_size", [1, 3])
def test_what_it_writes_is_decoded(folder: Path, batch_size: int) -> None:
    found, lm = answers(folder, "write", batch_size)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    decoder = Decoder(AutoModelForCausalLM.from_pretrained(folder / "model"), folder / "p.yaml")
    for text, answer in zip(WORDS, found, strict=True):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        tokens = torch.cat(list(decoder.decode(ids, max_new_tokens=20, stop_tokens=[tokenizer.eos_token_id])))
        assert answer == tokenizer.decode(tokens, skip_special_tokens=True)
    assert lm.skipped()["skip_ratio"] == pytest.approx(decoder.stats.skip_ratio, abs=0.02 if batch_size > 1 else 1e-6)
    assert lm.applied.path == decoder.path


def test_dense_and_profile_stand_side_by_side(folder: Path, tmp_path: Path) -> None:
    result = succeed(
        *("eval", folder / "model", "--profile", folder / "p.yaml", "--tasks", "judge,write", "--limit", 2),
        *("--include-path", folder, "--format", "json", "--output", tmp_path / "all.json"),
    )
    document = json.loads(result.stdout)
    assert {(row["task"], row["metric"]) for row in document["rows"]} == {("judge", "acc"), ("write", "exact_match")}
    assert document["skip_ratio"] > 0
    whole = json.loads((tmp_path / "all.json").read_text())
    texts = {name: [sample["resps"] for sample in whole[name]["samples"]["judge"]] for name in ("dense", "profile")}
    assert texts["dense"] != texts["profile"]


def test_lm_evals_own_command_line_takes_it(folder: Path) -> None:
    command = [sys.executable, "-m", "ffnskip_cli.lm_eval", "run", "--model", "ffnskip", "--tasks", "judge"]
    command += ["--model_args", f"pretrained={folder / 'model'},profile={folder / 'p.yaml'}", "--device", "cpu"]
    done = subprocess.run([*command, "--include_path", str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "|judge|" in done.stdout


def test_mistakes_are_one_sentence(folder: Path) -> None:
    with pytest.raises(FfnskipError, match="needs profile=FILE"):
        FFNSkipLM(str(folder / "model"))
    said = mistake("eval", folder / "model", "--profile", folder / "p.yaml", "--tasks", "no_such_task")
    assert said.startswith("lm-eval knows no task no_such_task")
