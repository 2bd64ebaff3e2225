"""`ffnskip bench`: what is timed, and what is said about it."""

from pathlib import Path

import pytest
from support.cli import bench_document, bench_rows, mistake, succeed, talk
from support.compiler import needs_compiler

from ffnskip import Decoder
from ffnskip_cli.bench import suite
from ffnskip_cli.measure.speed import Speed
from ffnskip_cli.sources.models import load_model
from ffnskip_cli.text.named import evaluation_text

SLOWER = "On this text decoding with the profile is slower than dense ("


def test_speed_is_timed_along_held_out_text_unless_on_what_the_model_makes_of_it(
    bench: tuple[object, ...], plateau_folder: Path, plateau_profiles: Path, text_file: Path
) -> None:
    profile = plateau_profiles / "0.05.yaml"
    loaded, size = load_model(str(plateau_folder)), {"tokens": 256, "sequence_length": 64, "seed": 0}
    text = evaluation_text(loaded, [str(text_file)], calibrated_on=["log.txt"], offline=True, **size).tokens
    for timed_on in ("text", "generated"):
        decoder = Decoder(loaded.model, profile, threshold=0.98)
        for row in text[:2]:
            forced = row[None, 8:] if timed_on == "text" else None
            assert len(list(decoder.decode(row[None, :8], max_new_tokens=40, forced=forced))) == 40
        options = ("--measure", "speed", "--new-tokens", 40, "--timed-on", timed_on, "--threshold", 0.98)
        document = bench_document(*bench, *options)
        assert document["timed_on"] == timed_on
        assert bench_rows(document)["ffnskip"]["decode_skip_ratio"] == decoder.stats.skip_ratio > 0


def test_text_is_packed_longer_to_be_timed_along_and_scored_as_before(bench: tuple[object, ...]) -> None:
    options = (*bench, "--measure", "quality,speed")
    short, long = bench_document(*options), bench_document(*options, "--new-tokens", 100)  # beyond the sequences of 64
    for figure in ("skip_ratio", "perplexity", "kl", "top1_agreement", "standard_error"):
        assert bench_rows(short)["ffnskip"][figure] == bench_rows(long)["ffnskip"][figure]
    assert long["eval_tokens"] == 256
    assert bench_rows(short)["ffnskip"]["decode_skip_ratio"] != bench_rows(long)["ffnskip"]["decode_skip_ratio"]


def test_a_text_too_short_to_be_timed_along_says_what_to_change(bench: tuple[object, ...], tmp_path: Path) -> None:
    (short := tmp_path / "short.txt").write_text("a cab had a bad head " * 10)
    options = (*bench, "--eval-dataset", short, "--eval-tokens", 128, "--measure", "speed", "--new-tokens", 300)
    assert mistake(*options) == (
        "The text has no 308 tokens in a row to time decoding along: lower --prompt-tokens or --new-tokens, name a "
        "longer --eval-dataset, or give --timed-on generated."
    )
    succeed(*options, "--timed-on", "generated")


@pytest.mark.parametrize(
    ("ffnskip", "timed_on", "said"),
    [
        (
            [9.0, 9.5, 9.0, 8.0, 9.0],
            "text",
            ["On this text decoding with the profile is slower than dense (speed-up 0.90"],
        ),
        ([9.0, 9.5, 9.0], "generated", [SLOWER.replace("this text", "its own continuations") + "speed-up 0.90)"]),
        ([9.0, 9.5, 9.0, 8.0, 10.1], "text", []),  # one pair of five says otherwise
        ([9.9, 9.9, 9.9, 9.9, 9.9], "text", []),  # by too little
        ([11.0, 12.0, 10.5, 11.0, 12.0], "text", []),
    ],
)
def test_a_profile_that_is_slower_than_dense_is_told_so(
    bench: tuple[object, ...], ffnskip: list[float], timed_on: str, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    speeds = {"dense": [10.0] * len(ffnskip), "ffnskip": ffnskip, "hf-dense": [1.0] * len(ffnskip)}
    monkeypatch.setattr(
        suite, "measure_speed", lambda *_: {name: Speed(rates, [0.1], [0.5]) for name, rates in speeds.items()}
    )
    result = succeed(*bench, "--measure", "speed", "--timed-on", timed_on)
    warnings = [line.removeprefix("Warning: ") for line in talk(result) if "slower than dense" in line]
    assert [line[: len(start)] for line, start in zip(warnings, said, strict=True)] == said


@needs_compiler
def test_a_breakdown_says_where_the_time_goes(bench: tuple[object, ...]) -> None:
    table = succeed(*bench, "--measure", "speed", "--breakdown").stdout
    header = next(line.split() for line in table.splitlines() if line.startswith("ms per token"))
    assert header[3:9] == ["attention", "ffn", "compensation", "rule", "head", "other"]
    assert header[9:] == ["prompt", "of", "the", "run"]
    rows = bench_rows(bench_document(*bench, "--measure", "speed"))
    for name in ("dense", "ffnskip"):
        breakdown = rows[name]["breakdown"]
        assert min(breakdown[part] for part in ("attention", "ffn", "head", "other")) > 0
        rate = rows[name]["tokens_per_second"]
        assert 1000 / rate["max"] * 0.99 <= sum(breakdown.values()) <= 1000 / rate["min"] * 1.01
        assert 0 < rows[name]["prompt_share"] < 1
    assert rows["dense"]["breakdown"]["compensation"] == 0
    assert rows["hf-dense"]["breakdown"] is None
