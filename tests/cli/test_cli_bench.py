"""`ffnskip bench`."""

import csv
import io
import json
from pathlib import Path

import pytest
from support.cli import SMALL, bench_document, bench_rows, mistake, succeed, talk
from support.compiler import COMPILES

from ffnskip.profiles.profile import load_profile, save_profile
from ffnskip_cli.budget import MAX_KL
from ffnskip_cli.calibration.assemble import evaluation_text as evaluation_section
from ffnskip_cli.sources.models import load_model
from ffnskip_cli.text import sources
from ffnskip_cli.text.named import evaluation_text

QUALITY = {
    *("skip_ratio", "flops_per_token", "flops_saved", "flops_saved_past_warm_up"),
    *("perplexity", "kl", "kl_reverse", "kl_percentiles", "top1_agreement", "standard_error"),
}
PARTS_ALONE = {"least_skipped"}  # of what leaves out parts
NOT_ASKED = {"missing", "kl_by_layer"}
WORST_CASE = {"never_skip_fraction", "repetition"}
OPPONENTS = ["random", "non-adaptive", "shortgpt", "teal"]
SPEED = {"first_token_seconds", "prompt_share", "tokens_per_second", "speedup", "ceiling", "decode_skip_ratio"}
BREAKDOWN = {"breakdown"} if COMPILES else set()  # where the time goes, on the fused path


def test_json_is_one_document_without_a_gap_in_its_main_rows(
    bench: tuple[object, ...], plateau_profiles: Path, text_file: Path
) -> None:
    document = bench_document(*bench, "--opponents", ",".join(OPPONENTS))
    rows = document.pop("rows")
    assert document == {
        "schema": "ffnskip-bench/v1",
        "model": "plateau",
        "profile": str(plateau_profiles / "0.05.yaml"),
        "threshold": load_profile(plateau_profiles / "0.05.yaml").skip.threshold,
        "device": "cpu",
        "dtype": "float32",
        "weights": "auto",
        "path": "fused" if COMPILES else "general",
        "eval_dataset": str(text_file),
        "eval_tokens": 256,
        "prompt_tokens": 8,
        "new_tokens": 12,
        "new_tokens_past_warm_up": 7,
        "timed_on": "text",
        "prompts": 2,
        "repetitions": 2,
    }
    assert [row["name"] for row in rows] == ["dense", "ffnskip", "hf-dense", *OPPONENTS]
    dense, ffnskip, hugging_face, *opponents = rows
    for row in (dense, ffnskip):
        assert set(row) == {"name", "breakdown"} | QUALITY | WORST_CASE | SPEED | PARTS_ALONE | NOT_ASKED
        assert {name for name, value in row.items() if value is None} == NOT_ASKED | PARTS_ALONE | (
            {"breakdown"} - BREAKDOWN
        )
    untimed = {"breakdown"} | PARTS_ALONE | NOT_ASKED
    assert {name for name, value in hugging_face.items() if value is None} == untimed | QUALITY | WORST_CASE
    for row in opponents:
        missing = untimed - (PARTS_ALONE if row["name"] == "teal" else set())
        assert {name for name, value in row.items() if value is None} == missing | WORST_CASE | SPEED
    for row in (dense, ffnskip, hugging_face):
        speed = row["tokens_per_second"]
        assert len(speed["samples"]) == 2
        assert speed["min"] <= speed["median"] <= speed["max"]
        assert {speed["min"], speed["max"]} == set(speed["samples"])
    assert (dense["skip_ratio"], dense["flops_saved"], dense["never_skip_fraction"]) == (0.0, 0.0, 1.0)
    assert (dense["speedup"], dense["ceiling"], dense["kl"], dense["top1_agreement"]) == (1.0, 1.0, 0.0, 1.0)
    assert 0.01 < ffnskip["skip_ratio"] < 0.1
    for row in opponents[1:]:  # random ones hold the saving on average only
        saved = row["flops_saved_past_warm_up"]
        assert saved == pytest.approx(ffnskip["flops_saved_past_warm_up"], abs=0.005)
    assert ffnskip["kl"] > 0.0


@pytest.mark.parametrize(
    ("parts", "fields"),
    [("quality", QUALITY), ("worst-case", WORST_CASE), ("speed, quality", SPEED | QUALITY | BREAKDOWN)],
)
def test_what_was_not_asked_for_is_null(bench: tuple[object, ...], parts: str, fields: set[str]) -> None:
    rows = bench_rows(bench_document(*bench, "--measure", parts))
    assert list(rows) == ["dense", "ffnskip", "hf-dense"][: 3 if "speed" in parts else 2]
    for name in ("dense", "ffnskip"):
        assert {field for field, value in rows[name].items() if value is not None} == {"name"} | fields


def test_a_threshold_that_none_reach_changes_nothing_and_one_that_all_reach_skips_all_but_the_first_layer(
    bench: tuple[object, ...],
) -> None:
    document = bench_document(*bench, "--threshold", 2.0)
    assert document["threshold"] == 2.0
    rows = bench_rows(document)
    row = rows["ffnskip"]
    assert (row["skip_ratio"], row["decode_skip_ratio"], row["never_skip_fraction"]) == (0.0, 0.0, 1.0)
    assert (row["kl"], row["top1_agreement"], row["ceiling"]) == (0.0, 1.0, 1.0)
    assert [row[name] for name in ("perplexity", "repetition")] == [
        rows["dense"][name] for name in ("perplexity", "repetition")
    ]
    assert row["flops_saved"] < 0.0
    row = bench_rows(bench_document(*bench, "--threshold", -1.0, "--measure", "quality,worst-case"))["ffnskip"]
    assert (row["skip_ratio"], row["never_skip_fraction"]) == (3 / 8, 0.0)


def test_quality_is_the_profiles_on_the_same_text_and_a_target_moves_along_its_curve(
    bench: tuple[object, ...], plateau_profiles: Path
) -> None:
    profile, options = load_profile(plateau_profiles / "0.05.yaml"), ("--measure", "quality", "--eval-tokens", 512)
    rows = bench_rows(bench_document(*bench, *options))
    assert rows["dense"]["perplexity"] == pytest.approx(profile.measured.perplexity_dense, rel=1e-4)
    for figure in ("perplexity", "kl", "top1_agreement", "skip_ratio", "flops_saved"):
        assert rows["ffnskip"][figure] == pytest.approx(getattr(profile.measured, figure), rel=1e-4), figure
    point = [point for point in profile.curve if point.kl <= MAX_KL][-1]
    result = succeed(*bench, *options, "--target", point.skip_ratio, "--format", "json")
    document = json.loads(result.stdout)
    assert document["threshold"] == point.threshold
    row = bench_rows(document)["ffnskip"]
    assert (row["skip_ratio"], row["kl"]) == pytest.approx((point.skip_ratio, point.kl), rel=1e-4)
    (said,) = talk(result)
    assert said.startswith(f"At ratio {point.skip_ratio:g} the profile should cost KL {point.kl:.3f} ")


def test_the_text_of_the_profile_is_the_default(plateau_folder: Path, tmp_path: Path) -> None:
    path, sizes = tmp_path / "own.yaml", ("--tokens", 256, "--eval-tokens", 128, "--sequence-length", 64)
    own = ("--dataset", "self", "--output", path)
    succeed("calibrate", plateau_folder, "--target", 0.1, *own, *SMALL, *sizes)
    options = ("--eval-tokens", 128, "--prompt-tokens", 8, "--measure", "quality")
    document = bench_document("bench", plateau_folder, "--profile", path, *options)
    assert document["eval_dataset"] == "self"
    assert bench_rows(document)["ffnskip"]["kl"] == pytest.approx(load_profile(path).measured.kl, rel=1e-4)


def test_several_texts_are_mixed(bench: tuple[object, ...], text_file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text(text_file.read_text()[::-1])
    document = bench_document(*bench, "--eval-dataset", f"{other}=3", "--measure", "quality")
    assert document["eval_dataset"] == f"{text_file} + {other}=3"
    assert document["eval_tokens"] == 256


def test_a_text_of_a_mixture_that_has_changed_is_pointed_out(
    plateau_folder: Path, plateau_profiles: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "demo_text_file", lambda part, offline: text_file)
    loaded, size = load_model(str(plateau_folder)), {"tokens": 128, "sequence_length": 64, "seed": 0}
    mixture = evaluation_section(
        evaluation_text(loaded, ["demo:c4", "self"], calibrated_on=["log.txt"], offline=True, **size)
    )
    old, new = mixture.parts
    changed = {"text_sha256": "ab" * 32, "parts": (old.model_copy(update={"text_sha256": "ab" * 32}), new)}
    profile = load_profile(plateau_profiles / "0.05.yaml")
    options = ("--eval-tokens", 128, "--prompt-tokens", 8, "--measure", "quality")
    for update, said in ({}, []), (changed, ["demo"]):
        evaluation = mixture.model_copy(update=update)
        save_profile(profile.model_copy(update={"evaluation": evaluation}), tmp_path / "mixture.yaml")
        result = succeed("bench", plateau_folder, "--profile", tmp_path / "mixture.yaml", *options)
        warnings = [line for line in talk(result) if "holds other text now" in line]
        assert [line.split()[1] for line in warnings] == said


def test_a_table_has_a_column_for_every_row_and_other_formats_a_line(
    bench: tuple[object, ...], plateau_profiles: Path
) -> None:
    over_budget = plateau_profiles / "0.30.yaml"
    result = succeed(*bench, "--profile", over_budget, "--measure", "quality", "--breakdown")
    verdict, no_breakdown = talk(result)
    assert verdict == f"Warning: This profile is {load_profile(over_budget).measured.verdict}."
    assert no_breakdown.startswith("Warning: Where the time goes is known")
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["row", "dense", "ffnskip"]
    figures = {line[:15].strip(): line[15:].split() for line in lines[2:] if line}
    assert figures["skip ratio"][0] == "0.000"
    assert "tokens/s" not in figures
    options = (*bench, "--measure", "quality,opponents", "--opponents", ",".join(OPPONENTS), "--format")
    names = ["dense", "ffnskip", *OPPONENTS]
    assert succeed(*options, "table").stdout.splitlines()[0].split() == ["row", *names]
    table = list(csv.DictReader(io.StringIO(succeed(*options, "csv").stdout)))
    assert [row["name"] for row in table] == names
    assert table[1]["tokens_per_second"] == ""
    header, _, *rows = [line for line in succeed(*options, "md").stdout.splitlines() if line]
    assert header.startswith("| row | skip ratio |")
    assert [row.split()[1] for row in rows] == names


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--measure", "speed,qualty"], "measure 'qualty': choose from quality, opponents, speed, worst-case"),
        (["--measure", "opponents,speed"], "--measure opponents needs the part quality as well"),
        (["--measure", ""], "--measure cannot measure ''"),
        (["--opponents", "random,dense"], "--opponents has no 'dense': choose from random, non-adaptive"),
        (["--sweep", "0.1,1.5"], "--sweep takes shares of all FLOPs between 0 and 1, not 0.1,1.5."),
        (["--sweep", "0.1", "--target", "0.05"], "--sweep moves the profile itself"),
        (["--worst-case", "1"], "--worst-case takes lengths of at least 2 tokens"),
        (["--worst-case", "600"], "The model takes at most 512 tokens, but this needs 608"),
        (["--warm-up", "5,many"], "--warm-up takes numbers with commas between them, not 5,many."),
        (["--warm-up", ","], "--warm-up names no number."),
        (["--warm-up", "2", "--measure", "quality"], "--measure, --opponents and --breakdown are of the usual rows"),
        (["--warm-up", "2", "--worst-case", "9", "--format", "csv"], "--format csv holds one table"),
        (["--opponents", "teal", "--measure", "quality"], "--opponents needs the part opponents in --measure."),
        (["--warm-up", "2.5"], "--warm-up takes whole numbers"),
        (["--profile", "missing.yaml"], "missing.yaml: cannot be read"),
        (["--threshold", "nan"], "The threshold must be a finite number, not nan."),
        (["--target", "0.9"], "not to 0.9: calibrate for that target instead."),
        (["--target", "0.1", "--threshold", "0.9"], "Give a threshold or a target, not both."),
        (["--eval-dataset", "self", "--eval-dataset", "self=2"], "the text self is named twice"),
        (["--eval-dataset", "self=0"], "the weight '0' of self"),
        (["--eval-dataset", "missing.txt"], "no such file: missing.txt"),
        (["--eval-dataset", "c4"], "the dataset allenai/c4 is not in the local Hugging Face cache"),
        (["--eval-tokens", "63"], "63 tokens are less than one sequence of 64"),
        (["--eval-tokens", "64"], "at least two sequences"),
        (["--prompt-tokens", "600"], "The model takes at most 512 tokens, but this needs 612"),
        (["--new-tokens", "505"], "The model takes at most 512 tokens, but this needs 513"),
        (["--dtype", "int4"], "unknown dtype 'int4'"),
        (["--device", "toaster"], "device 'toaster' cannot be used here"),
        (["--weights", "int4"], "int4 needs rows of a multiple of 32 numbers, not 48: choose int8"),
    ],
)
def test_wrong_options(bench: tuple[object, ...], options: list[str], words: str) -> None:
    assert words in mistake(*bench, *options)


def test_a_local_file_must_be_named_again_and_a_profile_be_of_the_model(
    bench: tuple[object, ...], plateau_folder: Path, plateau_profiles: Path, pico_folder: Path
) -> None:
    assert mistake("bench", plateau_folder, "--profile", plateau_profiles / "0.05.yaml") == (
        "The profile was measured on the local file log.txt: name it, or another text, with --eval-dataset."
    )
    assert "model.n_layers is 8 in the profile" in mistake("bench", pico_folder, *bench[2:])


def test_packed_weights_are_compared_with_the_model_as_it_was_loaded(bench: tuple[object, ...]) -> None:
    document = bench_document(*bench, "--measure", "quality,speed", "--weights", "int8")
    assert (document["weights"], document["dtype"]) == ("int8", "float32")
    rows = bench_rows(document)
    dense, ffnskip = rows["dense"], rows["ffnskip"]
    assert (dense["skip_ratio"], dense["flops_saved"]) == (0.0, 0.0)
    assert 0 < dense["kl"] < ffnskip["kl"]
    assert dense["top1_agreement"] <= 1.0
    assert set(dense["standard_error"]) == {"skip_ratio", "perplexity", "kl", "top1_agreement"}
    plain = bench_rows(bench_document(*bench, "--measure", "quality"))
    assert dense["perplexity"] != plain["dense"]["perplexity"]


def test_a_sweep_prints_the_rows_of_each_saving_and_what_is_out_of_reach(bench: tuple[object, ...]) -> None:
    options = (*bench, "--sweep", "0.9,0.02", "--measure", "quality")
    document = bench_document(*options)
    assert "rows" not in document
    assert [point["target"] for point in document["sweep"]] == [0.02, 0.9]
    _, ffnskip = document["sweep"][0]["rows"]
    assert ffnskip["flops_saved_past_warm_up"] == pytest.approx(0.02, abs=0.01)
    table = succeed(*options).stdout
    assert "No rows at 0.9: it saves at most 0." in " ".join(table.split())


def test_tables_of_worst_case_and_warm_up_are_printed_and_written(bench: tuple[object, ...], tmp_path: Path) -> None:
    options = ("--worst-case", "8,16", "--warm-up", "0,4", "-o", tmp_path / "tables.json")
    document = bench_document(*bench, *options)
    assert json.loads((tmp_path / "tables.json").read_text()) == document
    assert [(row["name"], row["length"]) for row in document["worst_case"]] == [
        ("profile", 8),
        ("profile", 16),
        ("paper", 8),
        ("paper", 16),
    ]
    assert [row["warm_up"] for row in document["warm_up"]] == [0, 4]
    words = succeed(*bench, *options).stdout
    assert "Table 6" in words
    assert "Figure 5" in words


@pytest.mark.parametrize(("option", "columns"), [("--warm-up", "warm_up,kl"), ("--worst-case", "name,threshold")])
def test_a_table_in_csv_has_all_of_its_columns(bench: tuple[object, ...], option: str, columns: str) -> None:
    header, *rows = succeed(*bench, option, "4,8", "--format", "csv").stdout.splitlines()
    assert header.startswith(columns)
    assert len(rows) == (2 if option == "--warm-up" else 4)
    assert "skip_ratio" in header or "repetition" in header
