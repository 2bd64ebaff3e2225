"""The toy rule of docs/adding-a-rule.md, known to nobody but this file."""

from pathlib import Path

import pytest
from support.calibrations import calibrated
from support.pico import pico_model, pico_tokens
from torch import Tensor

from ffnskip import rules
from ffnskip.decoder import Decoder
from ffnskip.profiles.profile import save_profile
from ffnskip.rules import Rule, SkipSettings, Turn, register
from ffnskip_cli.bench.suite import Plan, run_suite
from ffnskip_cli.calibration.settings import Goal, Settings
from ffnskip_cli.progress import silently


class EveryNthTurn(Turn):
    def skipping(self, layer: int, value: Tensor | None) -> Tensor:
        before, after = (int((layer - self.skip.cold_s + n) * self.skip.threshold + 0.5) for n in (0, 1))
        return self.allowed & (after > before)


class EveryNth(Rule):
    name = "every-nth"
    least, never = 0.0, 0.0
    steps = range(-1000, 1)
    decides_by = "the share of the FFNs to skip"

    def threshold_at(self, step: int) -> float:
        return -step / 1000

    def strictness(self, threshold: float) -> float:
        return -threshold

    def turn(self, skip: SkipSettings, allowed: Tensor) -> Turn:
        return EveryNthTurn(skip, allowed)

    def sentence(self, skip: SkipSettings, layers: str) -> str:
        return f"In {layers}, a share of {skip.threshold:g} of the FFNs is skipped for every token."


def test_a_rule_calibrates_generates_and_benches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "_RULES", dict(rules._RULES))
    register(EveryNth())
    model, text, held_out = pico_model(), pico_tokens(24, batch=12), pico_tokens(24, batch=4, seed=1)
    goal = Goal("target_ratio", 1 / 3)
    settings = Settings((goal,), rule="every-nth", compensate="none", tokens=288, sequence_length=24, warm_up=3)
    (compiled,) = calibrated(model, text, held_out, settings).finished
    assert compiled.calibration_ratio == pytest.approx(1 / 3)
    save_profile(compiled.profile, tmp_path / "p.yaml")
    decoder = Decoder(model, tmp_path / "p.yaml")
    assert len(list(decoder.decode(text[:1, :4], max_new_tokens=12))) == 12
    assert decoder.stats.skip_ratio == pytest.approx(1 / 3)
    plan = Plan(frozenset({"quality", "speed"}), 8, 12, 1, 1)
    dense, skipping, _ = run_suite(model, decoder, held_out, plan, silently)
    assert skipping["skip_ratio"] == pytest.approx(1 / 3)
    assert dense["flops_per_token"] > skipping["flops_per_token"]
