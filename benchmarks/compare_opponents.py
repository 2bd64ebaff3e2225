"""Compare ways to save FLOPs at equal savings: a profile, moved, and its opponents, on a text and on questions.

    python benchmarks/compare_opponents.py demo profile.yaml --text text.txt --questions gsm8k.jsonl -o docs/comparison

writes OUTPUT.json and OUTPUT.svg and prints tables as Markdown. Savings are shares of all FLOPs past warm-up, net. KL
is that of the text past the profile's warm-up. On questions, agreement is the share of tokens of the dense model's own
greedy answer that the other model would have written as well, having read the answer so far; question and template are
the prompt, and each answer's first tokens are its warm-up. What OUTPUT.json holds is not measured again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from ffnskip.decoder import Decoder
from ffnskip.errors import FfnskipError
from ffnskip.general.wrap import Applied
from ffnskip.profiles.profile import load_profile
from ffnskip_cli import console
from ffnskip_cli.bench.suite import measured_rows
from ffnskip_cli.calibration.lab import Lab
from ffnskip_cli.calibration.threshold.move import Mover
from ffnskip_cli.opponents import OPPONENTS, Field, Opponent
from ffnskip_cli.sources.models import LoadedModel, load_model
from ffnskip_cli.text.corpus import Ingredient, build_mixture
from ffnskip_cli.text.named import open_all, sampled_from

SAMPLE, SOLVED_ON = 8, 4  # sequences that opponents are set up on, and the profile is moved on
OURS = "ffnskip"


def main(
    model: Annotated[str, typer.Argument(help="The model.")],
    profile: Annotated[Path, typer.Argument(help="Its profile.")],
    text: Annotated[str, typer.Option(help="What to score: a file or a dataset.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Files to write, without suffix.")],
    questions: Annotated[list[Path] | None, typer.Option(help="JSON lines, or `question | answer` lines.")] = None,
    savings: Annotated[str, typer.Option(help="Shares of all FLOPs past warm-up.")] = "0.05,0.10,0.20",
    tokens: Annotated[int, typer.Option(help="Tokens to score.")] = 4096,
    limit: Annotated[int, typer.Option(help="Questions of each file.")] = 32,
    new_tokens: Annotated[int, typer.Option(help="Tokens of each answer, at most.")] = 96,
    warm_up: Annotated[int, typer.Option(help="Tokens of each answer that run dense.")] = 5,
) -> None:
    """Measure, write, print."""
    loaded, ours = load_model(model, dtype="float32"), load_profile(profile)
    lab = Lab(loaded.model, console.track)
    scored = _text(loaded, text, tokens, ours.evaluation.sequence_length if ours.evaluation else 256)
    answers = {path.stem: list(_answers(loaded, path, limit, new_tokens)) for path in questions or []}
    file = output.with_suffix(".json")
    file.parent.mkdir(parents=True, exist_ok=True)
    head = {"model": ours.model.id, "text": Path(text).name, "tokens": tokens, "warm_up": ours.skip.warm_up}
    head |= {"questions": list(answers), "limit": limit, "new_tokens": new_tokens, "warm_up_of_answers": warm_up}
    before: dict[str, Any] = json.loads(file.read_text()) if file.exists() else head | {"points": []}
    points: list[dict[str, Any]] = before.pop("points")
    if before != head:
        raise typer.BadParameter(f"{file} holds the points of other settings: name another --output.")
    mover = Mover(lab, ours, scored[:SOLVED_ON])
    for saved in map(float, savings.split(",")):
        for name in (OURS, *OPPONENTS):
            if any((point["name"], point["target"]) == (name, saved) for point in points):
                continue
            field = Field(lab, ours, saved, scored[:SAMPLE])
            points.append({"name": name, "target": saved} | _point(name, field, mover, scored, answers, warm_up))
            file.write_text(json.dumps(head | {"points": points}, indent=1) + "\n")
    for figure, form in (("kl", ".4f"), *((task, ".3f") for task in answers)):
        _print_table(points, figure, form)
    _draw(points, ours.model.id, output.with_suffix(".svg"))


def _text(loaded: LoadedModel, name: str, tokens: int, length: int) -> torch.Tensor:
    sources = open_all([name], sampled_from(loaded, "0"), False)
    ingredients = [Ingredient(source, "all", weight) for source, weight in sources]
    return build_mixture(ingredients, loaded.tokenizer, tokens=tokens, sequence_length=length, seed=0).tokens


def _answers(loaded: LoadedModel, path: Path, limit: int, new_tokens: int) -> Iterator[tuple[int, torch.Tensor]]:
    """For each question, how long its prompt is, and prompt and dense greedy answer, ``[length]``."""
    decoder = Decoder(loaded.model)
    for line in console.track(path.read_text().splitlines()[:limit], f"dense answers to {path.stem}", limit):
        question = json.loads(line)["question"] if path.suffix == ".jsonl" else line.partition("|")[0].strip()
        message = [{"role": "user", "content": question}]
        prompt = loaded.tokenizer.apply_chat_template(
            message, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
        stop = {loaded.tokenizer.eos_token_id}
        answer = torch.stack(list(decoder.decode(prompt, max_new_tokens=new_tokens, stop_tokens=stop)), dim=1)
        yield prompt.shape[1], torch.cat([prompt, answer], dim=1)[0]


def _point(
    name: str,
    field: Field,
    mover: Mover,
    text: torch.Tensor,
    answers: dict[str, list[tuple[int, torch.Tensor]]],
    warm_up: int,
) -> dict[str, Any]:
    try:
        opponent = Opponent(mover.saving(field.saved)) if name == OURS else OPPONENTS[name](field)
    except FfnskipError as error:
        return {"missing": str(error)}
    (row,) = measured_rows({name: opponent}, field, text)
    figures = {figure: row[figure] for figure in ("skip_ratio", "flops_saved_past_warm_up", "kl", "top1_agreement")}
    figures["kl_error"] = row["standard_error"]["kl"]
    for task, pairs in answers.items():
        shares = torch.tensor([_agreement(opponent, field.model, *pair, warm_up) for pair in pairs]).double()
        figures |= {task: float(shares.mean()), f"{task}_error": float(shares.std() / len(shares) ** 0.5)}
    return figures


@torch.inference_mode()
def _agreement(opponent: Opponent, model: Any, prompt: int, sequence: torch.Tensor, warm_up: int) -> float:
    """The share of the answer's tokens behind its warm-up that the other model would have written, too."""
    first = prompt + warm_up
    if first >= len(sequence):
        return 1.0  # dense to its end
    profile = opponent.profile.with_skip(warm_up=first)
    way = opponent.way
    with Applied(model, profile, "score") if way is None else way.applied(model, profile, sequence):
        logits = model(sequence[None], use_cache=False).logits[0]
    return float((logits[first - 1 : -1].argmax(dim=-1) == sequence[first:]).double().mean())


def _print_table(points: list[dict[str, Any]], figure: str, form: str) -> None:
    targets = sorted({point["target"] for point in points})
    print(f"\n| {figure} at | " + " | ".join(f"{target:g}" for target in targets) + " |")
    print("|---" * (len(targets) + 1) + "|")
    for name in dict.fromkeys(point["name"] for point in points):
        at = {point["target"]: point for point in points if point["name"] == name}
        cells = [
            f"{at[target][figure]:{form}} ± {at[target][f'{figure}_error']:{form}}" if figure in at[target] else "–"
            for target in targets
        ]
        print(f"| {name} | " + " | ".join(cells) + " |")


def _draw(points: list[dict[str, Any]], title: str, path: Path) -> None:
    """KL against what is saved."""
    from matplotlib import style
    from matplotlib.figure import Figure

    from ffnskip_cli.report.plot import METADATA, STYLE

    with style.context(STYLE):
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.subplots()
        for index, name in enumerate(dict.fromkeys(point["name"] for point in points)):
            pairs = sorted((p["flops_saved_past_warm_up"], p["kl"]) for p in points if p["name"] == name and "kl" in p)
            if pairs:
                marker, width = "oD^vsPX*<>pd"[index % 12], 2.5 if name == OURS else 1
                axes.plot(*zip(*pairs, strict=True), marker=marker, lw=width, label=name)
        axes.set(xlabel="share of all FLOPs saved past the warm-up", ylabel="KL from dense, nats per token")
        axes.set_yscale("log")
        axes.grid(alpha=0.3)
        axes.set_title(title, loc="left", fontsize="medium", parse_math=False)
        figure.legend(loc="outside right upper", frameon=False)
        figure.savefig(path, metadata=METADATA[".svg"])


if __name__ == "__main__":
    typer.run(main)
