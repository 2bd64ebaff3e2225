"""The rule `price` from calibration to benchmark."""

import json
from pathlib import Path

import pytest
from support.cli import bench_document, bench_rows, succeed
from support.compiler import COMPILES


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
    model, text = calibrate[1], calibrate[3]
    sizes = ("--eval-dataset", text, "--eval-tokens", 256, "--prompt-tokens", 8, "--new-tokens", 12, "-r", 1)
    document = bench_document("bench", model, "--profile", path, *sizes, "--measure", "quality,speed")
    assert document["path"] == ("fused" if COMPILES else "general")
    skipping = bench_rows(document)["ffnskip"]
    assert 0 < skipping["least_skipped"] < skipping["skip_ratio"] < 1
    assert skipping["ceiling"] > 1
