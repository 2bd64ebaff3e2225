"""What `ffnskip eval` does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets

from ffnskip.cached import cache_dir
from ffnskip.errors import FfnskipError, reason
from ffnskip.fast.fused_forward import FusedForward
from ffnskip.profiles.fingerprint import weights_sha256
from ffnskip.profiles.identity import config_sha256
from ffnskip_cli import console
from ffnskip_cli.commands import common, loading
from ffnskip_cli.commands.eval import Options
from ffnskip_cli.evaluation import conversations, documents, figures, writing
from ffnskip_cli.evaluation.answers import Answers, DenseLM, Remembering, SkippingLM
from ffnskip_cli.evaluation.figures import Pair
from ffnskip_cli.evaluation.judge import Judge, contests, is_judged
from ffnskip_cli.evaluation.lm_tasks import LmTasks, Results, Settings, quiet
from ffnskip_cli.progress import Journal
from ffnskip_cli.report.evaluation import page, print_evaluation
from ffnskip_cli.report.plot import refuse_without_matplotlib


def run(options: Options) -> None:
    """Evaluate the dense model, then the same model with the profile, and print a row per metric."""
    if common.is_page(options.output):
        refuse_without_matplotlib()
    exam = _Exam(options)
    pair = loading.load_pair(
        options.model, options.profile, options.move, options.model_options, other_weights=options.other_weights
    )
    loaded, profile, _ = pair
    common.say_expected_cost(profile, options.move)
    dense_answers, answers = _answers(options, pair)
    given = {"pretrained": loaded.model, "tokenizer": loaded.tokenizer, "batch_size": options.batch_size}
    with quiet():
        dense_model = DenseLM(**given)
    console.talk.print("Evaluating the dense model …")
    with FusedForward(loaded.model, None).install():  # as it decodes with the profile, too
        dense = exam.take(dense_model, dense_answers)
    with quiet():
        skipping_model = SkippingLM(**given, profile=profile, other_weights=True)  # that was checked
    console.talk.print("Evaluating the model with the profile …")
    with skipping_model.applied as applied:
        skipping = exam.take(skipping_model, answers)
        answers.settle()
    pairs = exam.pairs(dense, skipping)

    def tokenize(text: str) -> list[int]:
        tokens: list[int] = loaded.tokenizer(text, add_special_tokens=False)["input_ids"]
        return tokens

    document = {
        **_about(options, pair),
        "answers": {"dense": str(dense_answers.path), "ffnskip": str(answers.path)},
        "skip_ratio": applied.stats.skip_ratio,
        "never_skip_fraction": applied.stats.never_skip_fraction,
        "tokens_past_warm_up": applied.stats.tokens,
        "warm_up_tokens": applied.stats.warm_up_tokens,
        "rows": [] if dense.results is None else figures.rows(exam.lm_tasks, dense.results, skipping.results or {}),
        "writing": writing.rows(pairs, tokenize),
        "agreement": writing.agreement(pairs, tokenize),
        "judge": _judged(options, pairs, answers.path.parent),
    }
    if options.output is not None:
        common.write_result(document, options.output, lambda: page(document, pairs))
    print_evaluation(document, options.format)


@dataclass(frozen=True)
class _Sheet:
    """What one model has answered."""

    results: Results | None
    talks: Sequence[tuple[str, str]]


class _Exam:
    """All tasks that the options name, with their data."""

    def __init__(self, options: Options) -> None:
        names, self._most = options.task_names, options.max_new_tokens
        if options.model_options.offline:
            datasets.config.HF_HUB_OFFLINE = True  # which is else read from the environment, at import only
        if options.judge.judge_url is not None and not any(map(is_judged, names)):
            raise FfnskipError("--judge-url judges mt_bench and cnn_dailymail, and --tasks names neither.")
        self._questions = _mt_bench(options) if conversations.TASK in names else []
        settings = Settings(
            options.num_fewshot, options.batch_size, options.limit, self._most, options.apply_chat_template
        )
        of_lm_eval = [name for name in names if name != conversations.TASK]
        self.lm_tasks = LmTasks(of_lm_eval, options.files, options.include_path, settings)

    def take(self, model: Remembering, answers: Answers) -> _Sheet:
        """Ask a model everything that it has not answered yet."""
        model.keep(answers)
        talks = conversations.hold(model, self._questions, self._most) if self._questions else []
        results = self.lm_tasks.evaluate(model) if self.lm_tasks.tasks else None
        if answers.taken:
            console.talk.print(f"{answers.taken} of its answers had been given before.", highlight=False)
        return _Sheet(results, talks)

    def pairs(self, dense: _Sheet, skipping: _Sheet) -> list[Pair]:
        """What both answered."""
        made = conversations.pairs(self._questions, dense.talks, skipping.talks)
        if dense.results is not None and skipping.results is not None:
            made += figures.pairs(dense.results, skipping.results)
        return made


def _mt_bench(options: Options) -> list[documents.Document]:
    """MT-Bench's questions, as many as are asked for."""
    file = options.files.get(conversations.TASK)
    try:
        questions = documents.mt_bench(None if file is None else str(file))
    except FfnskipError:
        raise
    except Exception as error:  # whatever the library of the day raises without a network
        raise FfnskipError(
            f"The questions of {conversations.TASK} cannot be fetched ({reason(error)}): "
            f"--data {conversations.TASK}=FILE takes a local copy."
        ) from error
    return questions[: options.limit]


def _answers(options: Options, pair: loading.Pair) -> tuple[Answers, Answers]:
    """Where the answers of the dense model are kept, and those of the one with the profile; says so."""
    loaded, profile, _ = pair
    subject = {
        "weights_sha256": weights_sha256(loaded.model),
        "config_sha256": config_sha256(loaded.model.config),
        "dtype": _dtype(pair),
    }
    output = options.output
    folder = cache_dir() / "answers" if output is None else output.with_name(f"{output.name}.answers")
    dense = Answers(folder, "dense", subject | {"profile": None})
    skipping = Answers(folder, "profile", subject | {"profile": profile.deciding})
    console.talk.print(f"Answers are kept in {dense.path} and {skipping.path.name}.", markup=False, highlight=False)
    return dense, skipping


def _judged(options: Options, pairs: Sequence[Pair], folder: Path) -> dict[str, Any] | None:
    """The judge's rows and its failures; None without a judge."""
    asked = options.judge
    if asked.judge_url is None or asked.judge_model is None:
        return None
    journal = Journal(folder / "verdicts.jsonl", resume=True)
    judge = Judge(asked.judge_url, asked.judge_model, asked.judge_timeout, journal)
    rows = judge.compare(contests(pairs), console.track)
    return {"model": asked.judge_model, "rows": rows, "failures": dict(judge.failures)}


def _dtype(pair: loading.Pair) -> str:
    return str(pair.loaded.model.dtype).removeprefix("torch.")


def _about(options: Options, pair: loading.Pair) -> dict[str, Any]:
    loaded, profile, profile_name = pair
    return {
        "schema": "ffnskip-eval/v1",
        "model": loaded.id,
        "profile": profile_name,
        "threshold": profile.skip.threshold,
        "device": loaded.placement,
        "dtype": _dtype(pair),
        "lm_eval": version("lm_eval"),
        "tasks": options.task_names,
        "num_fewshot": options.num_fewshot,
        "limit": options.limit,
        "max_new_tokens": options.max_new_tokens,
        "apply_chat_template": options.apply_chat_template,
        "batch_size": options.batch_size,
    }
