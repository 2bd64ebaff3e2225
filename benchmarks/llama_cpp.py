"""Decoding and reading prompts beside llama.cpp, by its own llama-bench, taking turns in one run.

    export OMP_WAIT_POLICY=PASSIVE
    python benchmarks/llama_cpp.py demo BIN --profile profiles/smollm2-135m-instruct/flops-0.15.yaml
    python benchmarks/llama_cpp.py 1.5B BIN --formats int8,int4

BIN is the folder with llama-bench and llama-quantize, which makes the files of all formats from one. The model is
`demo`, or has random weights in the shape of a Qwen2 with 1.5 billion parameters. Prints a table as Markdown: tokens
per second of decoding behind the prompt and of reading the prompt, medians of the turns, and the medians within turns
of each row's speeds over those of llama.cpp's format named beside it. Rows with a profile decode along held-out text
(demo) or leave out 40 % of the FFNs' inputs and neurons, or every other FFN, whatever the text (1.5B). Beside dense
rows stands what they read per second, weights only; the last line says what the memory gives to a sum.

With `--busy` another process keeps one core busy meanwhile.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Literal

import gguf
import torch
import typer
from sparse_step import forced_profile, random_model
from torch import Tensor, nn

from ffnskip import Decoder, Profile, load_profile, pack_weights
from ffnskip.model.packed import PackedLinear
from ffnskip.profiles.identity import model_info
from ffnskip.profiles.schema import Compensation, Skip
from ffnskip_cli import console
from ffnskip_cli.measure.flops import mean_keys, model_cost, overhead
from ffnskip_cli.sources.demo import demo_model_file
from ffnskip_cli.sources.models import load_model
from ffnskip_cli.text.sources import open_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel

AGAINST = {"bfloat16": ("F16",), "int8": ("Q8_0",), "int4": ("Q4_K_M", "Q4_0")}


@dataclass
class Row:
    """What one way to decode took, turn by turn.

    Attributes:
        run: decodes once; gives tokens per second of decoding and of the prompt.
        format: of the weights.
        nbytes: of the weights.
        model, decoder: of ours.
    """

    run: Callable[[], tuple[float, float]]
    format: str
    nbytes: int
    model: PreTrainedModel | None = None
    decoder: Decoder | None = None
    decoding: list[float] = field(default_factory=list)
    reading: list[float] = field(default_factory=list)


def main(
    model: Annotated[Literal["demo", "1.5B"], typer.Argument(help="The model.")],
    binaries: Annotated[Path, typer.Argument(metavar="BIN", help="Folder of llama-bench and llama-quantize.")],
    profile: Annotated[Path | None, typer.Option(help="A profile of the demo model.")] = None,
    formats: Annotated[str, typer.Option(help="Formats of ours, of bfloat16, int8, int4.")] = "bfloat16,int8,int4",
    prompt: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 256,
    new_tokens: Annotated[int, typer.Option(help="Tokens to decode.")] = 64,
    turns: Annotated[int, typer.Option(help="Turns.")] = 7,
    threads: Annotated[int | None, typer.Option(help="Threads of both.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write OUTPUT.json and a picture, OUTPUT.svg.")
    ] = None,
    busy: Annotated[bool, typer.Option("--busy", help="Keep one core busy with something else.")] = False,
) -> None:
    """Measure and print."""
    if os.environ.get("OMP_WAIT_POLICY") != "PASSIVE":
        raise typer.BadParameter("set OMP_WAIT_POLICY=PASSIVE, or idle threads of ours take the cores from llama.cpp's")
    if threads is not None:
        torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder, _neighbour(busy):
        plain, text, file = _demo(prompt + new_tokens) if model == "demo" else _random(prompt + new_tokens, folder)
        rows: dict[str, Row] = {}
        for format in formats.split(","):
            rows |= _ours(plain, format, profile, text, prompt)
            for theirs in AGAINST[format]:
                rows[f"llama.cpp {theirs}"] = _theirs(binaries, file, theirs, Path(folder), prompt, new_tokens)
        names = list(rows)
        memory = []
        for row in rows.values():
            row.run()  # not counted
        for turn in console.track(range(turns), "measuring", turns):
            memory.append(_memory())
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                decoding, reading = rows[name].run()
                rows[name].decoding.append(decoding)
                rows[name].reading.append(reading)
    table = _table(rows, mean_keys(prompt, new_tokens))
    for line in table:
        print("| " + " | ".join(line) + " |")
    print(f"\nA sum over 1 GB reads {median(memory):.1f} GB/s.")
    if output is not None:
        document = {name: {"decoding": row.decoding, "reading": row.reading} for name, row in rows.items()}
        output.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")
        _draw(
            rows,
            output.with_suffix(".svg"),
            f"{model}, {torch.get_num_threads()} threads, {prompt} + {new_tokens} tokens",
        )


def _demo(length: int) -> tuple[PreTrainedModel, Tensor, Path]:
    loaded = load_model("demo", dtype="bfloat16", device="cpu")
    words = "".join(document for document, _ in zip(open_text("demo").documents(), range(50), strict=False))
    text = loaded.tokenizer(words, return_tensors="pt")["input_ids"][:, :length]
    return loaded.model, text, demo_model_file(offline=False)


def _random(length: int, folder: str) -> tuple[PreTrainedModel, Tensor, Path]:
    model = random_model(28, "bfloat16").requires_grad_(False)
    file = Path(folder) / "random.gguf"
    _write_gguf(model, file)
    return model, torch.randint(0, 150_000, (1, length)), file


def _ours(plain: PreTrainedModel, format: str, path: Path | None, text: Tensor, prompt: int) -> dict[str, Row]:
    """The dense loop in a format, and with profiles on, each on a model of its own: each lies as it is read."""
    profiles: dict[str, Profile | None] = {"dense": None}
    if path is not None:
        profiles[path.stem] = load_profile(path)
    elif plain.config.model_type == "qwen2":
        profiles |= {"40 % of FFNs' parts": forced_profile(plain, 0.4), "every other FFN": _every_other(plain)}
    rows, packed = {}, deepcopy(plain)
    if format != "bfloat16":
        pack_weights(packed, format)  # type: ignore[arg-type]
    for name, profile in profiles.items():
        model = deepcopy(packed)
        decoder = Decoder(model, profile, path="fused", check=False)
        rows[f"ffnskip {format}, {name}"] = Row(_run(decoder, text, prompt), format, _nbytes(model), model, decoder)
    return rows


def _nbytes(model: PreTrainedModel) -> int:
    layers = [m for m in model.modules() if isinstance(m, PackedLinear | nn.Linear)]
    return sum(m.matrix.nbytes if isinstance(m, PackedLinear) else m.weight.nbytes for m in layers)


def _memory() -> float:
    """GB/s that all threads together read."""
    numbers = torch.ones(2**28)
    start = time.perf_counter()
    numbers.sum()
    return numbers.nbytes / (time.perf_counter() - start) / 1e9


def _run(decoder: Decoder, text: Tensor, prompt: int) -> Callable[[], tuple[float, float]]:
    n = text.shape[1] - prompt

    def run() -> tuple[float, float]:
        decoder.reset_stats()
        times = [time.perf_counter()]
        for token in decoder.decode(text[:, :prompt], max_new_tokens=n, forced=text[:, prompt:]):
            int(token)
            times.append(time.perf_counter())
        warm_up = 0 if decoder.profile is None else min(decoder.profile.skip.warm_up, n // 2)
        first = 1 + warm_up
        return (len(times) - 1 - first) / (times[-1] - times[first]), prompt / (times[1] - times[0])

    return run


def _theirs(binaries: Path, file: Path, format: str, folder: Path, prompt: int, new_tokens: int) -> Row:
    target = folder / f"{format}.gguf"
    command = [str(binaries / "llama-quantize"), "--allow-requantize", str(file), str(target), format]
    subprocess.run(command, check=True, capture_output=True)
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    bench = [str(binaries / "llama-bench"), "-m", str(target), "-t", str(torch.get_num_threads()), "-r", "1"]

    def speed(*options: object) -> float:
        answer = subprocess.run(
            [*bench, "-o", "json", *map(str, options)], check=True, capture_output=True, text=True, env=environment
        ).stdout
        return float(json.loads(answer)[0]["avg_ts"])

    def run() -> tuple[float, float]:
        return speed("-p", 0, "-n", new_tokens, "-d", prompt), speed("-p", prompt, "-n", 0)

    return Row(run, format, target.stat().st_size)


def _every_other(model: PreTrainedModel) -> Profile:
    """A profile of the paper's rule that skips every other FFN whatever the similarity."""
    n_layers = model.config.num_hidden_layers
    return Profile(
        schema="ffnskip/v1",
        model=model_info(model, id="random/weights"),
        skip=Skip(rule="cosine", threshold=-1.0, window=1, warm_up=0, cold_s=0, cold_e=n_layers),
        compensation=Compensation(kind="none"),
        made_with={},
    )


def _write_gguf(model: PreTrainedModel, path: Path) -> None:
    """A file that llama.cpp loads, without a vocabulary; of float16, from which it makes the others."""
    config = model.config
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue  # tied
        known = names.get_name(name, (".weight", ".bias"))
        writer.add_tensor(known, tensor.to(torch.float16 if tensor.dim() == 2 else torch.float32).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@contextmanager
def _neighbour(busy: bool) -> Iterator[None]:
    if not busy:
        yield
        return
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()


def _table(rows: dict[str, Row], keys: float) -> list[list[str]]:
    beside = ["over llama.cpp", "over dense", "ceiling", "GB/s"]
    head = ["", "decoding, tokens/s", *beside, "prompt, tokens/s", "over llama.cpp"]
    lines = [head, ["---"] * len(head)]
    for name, row in rows.items():
        over, gain, most, read, prompt = "", "", "", f"{median(row.decoding) * row.nbytes / 1e9:.1f}", ""
        if row.decoder is not None and row.model is not None:
            others = {format: rows[f"llama.cpp {format}"] for format in AGAINST[row.format]}
            over = ", ".join(f"{_ratio(row.decoding, other.decoding):.2f} {f}" for f, other in others.items())
            prompt = ", ".join(f"{_ratio(row.reading, other.reading):.2f} {f}" for f, other in others.items())
            if (profile := row.decoder.profile) is not None:
                dense = rows[f"ffnskip {row.format}, dense"]
                gain, read = f"{_ratio(row.decoding, dense.decoding):.2f}", ""
                most = f"{model_cost(row.model).ceiling(row.decoder.stats, overhead(profile, row.model), keys):.2f}"
        speeds = f"{median(row.decoding):.1f}", f"{median(row.reading):.0f}"
        lines.append([name, speeds[0], over, gain, most, read, speeds[1], prompt])
    return lines


def _draw(rows: dict[str, Row], path: Path, title: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 0.5 + 0.3 * len(rows)), layout="constrained")
    axes = figure.add_subplot(xlabel="tokens per second of decoding", title=title)
    speeds = [median(row.decoding) for row in rows.values()]
    colours = ["C7" if row.decoder is None else "C0" if row.decoder.profile is None else "C2" for row in rows.values()]
    axes.bar_label(axes.barh(list(rows), speeds, color=colours), fmt=" %.0f")
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def _ratio(mine: list[float], others: list[float]) -> float:
    return median(a / b for a, b in zip(mine, others, strict=True))


if __name__ == "__main__":
    typer.run(main)
