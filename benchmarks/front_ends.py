"""The same prompts through every front end: equal greedy tokens, equal ratio, and the tokens per second of each.

    python benchmarks/front_ends.py --profile profiles/smollm2-135m-instruct/flops-0.15.yaml

prints a table as Markdown. Prompts are the beginnings of documents of a text, decoded in float32 one after the other
(`batched`: all at once, with continuous batching). `same` counts the prompts whose continuation is that of
`Decoder`, the first row; with `--nothing-skipped` it says how much of what differs is the rounding of other kernels.
Prompts are part of the time; loading is not. Front ends run one after the other, so speeds of
a machine that others use as well are to be taken with care. `--only` runs the rows that it names, beside the first.
"""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated

import openai
import torch
import typer
from transformers import pipeline

import ffnskip
from ffnskip import Decoder
from ffnskip.profiles.profile import save_profile
from ffnskip_cli.sources.models import LoadedModel, load_model, loadable_name
from ffnskip_cli.text.sources import open_text

_SHORTEST = 400  # characters of a document that a prompt is taken from
# Of the free memory, for continuous batching's keys and values. Unless told, transformers takes nine tenths, which is
# meant for a GPU and leaves nothing to what else runs on a CPU.
_BATCHED = ("--continuous-batching", "--cb-max-memory-percent", "0.2")


@dataclass(frozen=True)
class Row:
    """What a front end wrote, and what that took."""

    answers: list[str]
    seconds: float
    ratio: float


def main(
    profile: Annotated[Path, typer.Option(help="The skip profile.")],
    model: Annotated[str, typer.Option(help="The model it was made for.")] = "demo",
    text: Annotated[str, typer.Option(help="Where the prompts come from.")] = "demo",
    prompts: Annotated[int, typer.Option(help="How many.")] = 64,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of each.")] = 32,
    new_tokens: Annotated[int, typer.Option(help="Tokens to generate.")] = 64,
    nothing_skipped: Annotated[bool, typer.Option(help="Move the threshold to where nothing is skipped.")] = False,
    vllm_python: Annotated[Path | None, typer.Option(help="Python of an environment with vLLM and ffnskip.")] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="A front end to run beside Decoder, by its row's name.")
    ] = None,
) -> None:
    """Measure and print."""
    if nothing_skipped:
        kept = tempfile.TemporaryDirectory()
        save_profile(ffnskip.load_profile(profile).never, never := Path(kept.name) / "never.yaml")
        profile = never
    loaded = load_model(model, dtype="float32", device="cpu")
    documents = (document for document in open_text(text).documents() if len(document) > _SHORTEST)
    cut = [loaded.tokenizer(document)["input_ids"][:prompt_tokens] for document in islice(documents, prompts)]
    asked = ([loaded.tokenizer.decode(ids) for ids in cut], new_tokens)
    folder = loadable_name(model, False)
    ways: dict[str, Callable[[], Row]] = {
        "Decoder": lambda: by_decoder(loaded, profile, *asked),
        "model.generate": lambda: by_generate(loaded, profile, *asked),
        "pipeline": lambda: by_pipeline(loaded, profile, *asked),
        "server": lambda: by_server(folder, profile, *asked),
        "server, batched": lambda: by_server(folder, profile, *asked, workers=prompts, options=_BATCHED),
    }
    if vllm_python is not None:
        ways["vLLM"] = lambda: by_vllm(vllm_python, folder, profile, *asked, batch=1)
        ways["vLLM, batched"] = lambda: by_vllm(vllm_python, folder, profile, *asked, batch=prompts)
    if unknown := set(only or ()) - ways.keys():
        raise typer.BadParameter(f"no row is called {', '.join(sorted(unknown))}, but {', '.join(ways)}.")
    print("| front end | tokens/s | same | ratio |\n|---|---|---|---|", flush=True)
    first: list[str] = []
    for name, way in ways.items():
        if first and only and name not in only:
            continue
        row = way()
        first = first or row.answers
        tokens = sum(len(loaded.tokenizer(answer)["input_ids"]) for answer in row.answers)
        same = sum(a == b for a, b in zip(row.answers, first, strict=True))
        print(f"| {name} | {tokens / row.seconds:.1f} | {same} of {len(first)} | {row.ratio:.3f} |", flush=True)


def by_decoder(loaded: LoadedModel, profile: Path, texts: list[str], new_tokens: int) -> Row:
    """One prompt at a time."""
    decoder = Decoder(loaded.model, profile)
    stop = loaded.model.generation_config.eos_token_id
    answers, start = [], time.perf_counter()
    for text in texts:
        ids = loaded.tokenizer(text, return_tensors="pt")["input_ids"]
        stops = stop if isinstance(stop, list) else [stop]
        tokens = torch.cat(list(decoder.decode(ids, max_new_tokens=new_tokens, stop_tokens=stops)))
        answers.append(loaded.tokenizer.decode(tokens, skip_special_tokens=True))
    return Row(answers, time.perf_counter() - start, decoder.stats.skip_ratio)


def by_generate(loaded: LoadedModel, profile: Path, texts: list[str], new_tokens: int) -> Row:
    """One prompt at a time."""
    with ffnskip.apply(loaded.model, profile) as applied:
        answers, start = [], time.perf_counter()
        for text in texts:
            inputs = loaded.tokenizer(text, return_tensors="pt")
            output = loaded.model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
            answer = output[0, inputs["input_ids"].shape[1] :]
            answers.append(loaded.tokenizer.decode(answer, skip_special_tokens=True))
        return Row(answers, time.perf_counter() - start, applied.stats.skip_ratio)


def by_pipeline(loaded: LoadedModel, profile: Path, texts: list[str], new_tokens: int) -> Row:
    """One prompt at a time, as pipelines do by default."""
    with ffnskip.apply(loaded.model, profile) as applied:
        pipe = pipeline("text-generation", model=loaded.model, tokenizer=loaded.tokenizer)
        start = time.perf_counter()
        outputs = pipe(texts, max_new_tokens=new_tokens, do_sample=False, return_full_text=False)
        seconds = time.perf_counter() - start
        return Row([output[0]["generated_text"] for output in outputs], seconds, applied.stats.skip_ratio)


def by_server(
    model: str, profile: Path, texts: list[str], new_tokens: int, workers: int = 1, options: tuple[str, ...] = ()
) -> Row:
    """As many requests at once as there are workers."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with server(model, profile, options, log) as ask:
            ask(texts[0], 2)  # the first request sets up what later ones use
            start = time.perf_counter()
            with ThreadPoolExecutor(workers) as pool:
                answers = list(pool.map(partial(ask, new_tokens=new_tokens), texts))
            seconds = time.perf_counter() - start
        (ratio,) = re.findall(r"skip_ratio (\S+),", log.read_text())
        return Row(answers, seconds, float(ratio))


def by_vllm(python: Path, model: str, profile: Path, texts: list[str], new_tokens: int, batch: int) -> Row:
    """As many prompts at once as a batch has, in another process; see `vllm_worker.py`."""
    asked = {"model": model, "profile": str(profile), "texts": texts, "new_tokens": new_tokens, "batch": batch}
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer"
        command = [str(python), str(Path(__file__).with_name("vllm_worker.py")), str(answer)]
        log = Path(folder) / "log"
        with log.open("w") as file:
            done = subprocess.run(command, input=json.dumps(asked), text=True, stdout=file, stderr=file)
        if done.returncode:
            raise RuntimeError(log.read_text())
        return Row(**json.loads(answer.read_text()))


@contextmanager
def server(model: str, profile: Path, options: tuple[str, ...], log: Path) -> Iterator[Callable[..., str]]:
    """`ffnskip serve`, which writes what it says to a file; gives what completes a text."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "ffnskip_cli", "serve", model, "--profile", str(profile), "--"]
    with log.open("w") as file:
        command += ["--port", str(port), "--dtype", "float32", *options]
        process = subprocess.Popen(command, stdout=file, stderr=file)
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")

    def ask(text: str, new_tokens: int) -> str:
        answer = client.completions.create(model=model, prompt=text, max_tokens=new_tokens, temperature=0.0)
        return answer.choices[0].text

    try:
        while socket.socket().connect_ex(("127.0.0.1", port)):
            if process.poll() is not None:
                raise RuntimeError(log.read_text())
            time.sleep(0.2)
        yield ask
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)


if __name__ == "__main__":
    typer.run(main)
