"""The rule `price` from calibration to benchmark."""

import json
from pathlib import Path

import pytest
from support.cli import bench_document, bench_rows, mistake, succeed
from support.compiler import COMPILES
from support.on_disk import bytes_as_tokens, save_text
from support.pico import pico_model


def test_parts_are_calibrated_inspected_and_benched(calibrate: tuple[object, ...], tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    options = ("--rule", "price", "--target-flops", 0.1, "--warm-up", 4, "--output", path)
    (row,) = json.loads(succeed(*calibrate, *options, "--format", "json").stdout)["profiles"]
    assert (row["rule"], row["target_flops"], row["target_ratio"]) == ("price", 0.1, None)
    assert row["flops_saved_past_warm_up"] == pytest.approx(0.1, abs=0.03)  # on other text than it was solved on
    assert 0 < row["least_skipped"] < row["skip_ratio"]
    said = succeed("inspect", path).stdout
    assert f"{row['threshold']:g} nats per FLOP" in said
    assert f"{row['least_skipped']:.1%}" in said
    assert "cos(h" not in said  # by which the rule does not go
    model, text = calibrate[1], calibrate[3]
    sizes = ("--eval-dataset", text, "--eval-tokens", 256, "--prompt-tokens", 8, "--new-tokens", 12, "-r", 1)
    document = bench_document("bench", model, "--profile", path, *sizes, "--measure", "quality,speed")
    assert document["path"] == ("fused" if COMPILES else "general")
    skipping = bench_rows(document)["ffnskip"]
    assert 0 < skipping["least_skipped"] < skipping["skip_ratio"] < 1
    assert skipping["ceiling"] > 1


def test_a_model_without_plain_matrices_is_refused_before_its_weights_are_loaded(tmp_path: Path) -> None:
    folder = tmp_path / "mixtral"
    pico_model("mixtral", vocab_size=258).save_pretrained(folder)
    bytes_as_tokens().save_pretrained(folder)
    (weights,) = folder.glob("*.safetensors")
    weights.write_bytes(b"whatever")
    text = save_text(tmp_path / "text.txt")
    said = mistake("calibrate", folder, "--dataset", text, "--target-flops", 0.1, "--output", tmp_path / "p.yaml")
    assert "no plain matrices" in said
