"""Every type of decoder: it skips exactly, or is refused with one sentence; docs/models.md has the whole list."""

import shutil
import time
from pathlib import Path

import pytest
import torch
from support.cli import mistake
from support.model_check import check_model, profile_of
from support.model_types import TYPES, UNBUILT, VISION, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM

import ffnskip
from ffnskip.model.sites import decoder_body, ffn_sites
from ffnskip.model.types import INPUT_ONLY, REFUSED

FAMILIES = ["llama", "llama4_text", "qwen2", "qwen3", "qwen3_moe", "qwen3_5_text", "gemma2", "gemma3_text"]
FAMILIES += ["gemma3n_text", "gemma4_text", "mistral", "phi3", "deepseek_v2", "deepseek_v3", "glm4", "glm4_moe"]
FAMILIES += ["gpt_oss", "olmo2", "olmo3", "smollm3", "granitemoehybrid", "falcon_h1", "lfm2", "nemotron", "nemotron_h"]
FAMILIES += ["opt", "openai-gpt", "minimax", "gemma3 (vision)", "qwen2_5_vl (vision)", "qwen3_vl (vision)"]
# Of the table, which was written with a later transformers than the oldest that is allowed.
LATER = {"bailing_hybrid", "beam", "dots3_note_text", "flint", "inkling2_text", "internlm3", "iquestcoder"}
LATER |= {"kolibri1", "lfm3", "moss_transcribe_diarize"}
TABLE = Path(__file__).parents[2] / "docs/models.md"


@pytest.mark.parametrize("name", FAMILIES)
def test_a_type_skips_exactly(name: str) -> None:
    verdict = check_model(tiny_model(name))
    assert verdict.wrong == []
    assert verdict.rules == ("all but cosine" if name in INPUT_ONLY else "any")


@pytest.mark.parametrize("name", REFUSED)
def test_a_type_that_cannot_skip_is_refused_from_its_configuration(name: str) -> None:
    model = tiny_model(name)
    start = time.perf_counter()
    with pytest.raises(ffnskip.UnsupportedModelError, match=rf"^Models of type '{name}' cannot skip FFNs: [^\n]+\.$"):
        ffn_sites(model)
    assert time.perf_counter() - start < 1.0


@pytest.mark.parametrize("name", ["bloom", "cpmant", "deepseek_v4", "hrm_text", "mpt", "zaya"])
def test_the_self_check_finds_it_too(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models of types that nobody has tried are found out by what they do."""
    monkeypatch.delitem(REFUSED, name)
    model = tiny_model(name)
    with pytest.raises(ffnskip.UnsupportedModelError):
        ffnskip.apply(model, profile_of(model, "predicted-damage", 0.0))


@pytest.mark.parametrize("name", INPUT_ONLY)
def test_cosine_is_refused_where_the_output_is_not_simply_added(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name in LATER and name not in TYPES:
        pytest.skip("a later transformers has this type")
    model = tiny_model(name)
    with pytest.raises(ffnskip.UnsupportedModelError, match="use --rule predicted-damage"):
        ffnskip.apply(model, profile_of(model, "cosine", 2.0))
    monkeypatch.setattr("ffnskip.model.types.INPUT_ONLY", ())
    with pytest.raises(ffnskip.UnsupportedModelError):
        ffnskip.apply(model, profile_of(model, "cosine", 2.0))


def test_the_table_in_the_docs_is_that_of_the_code() -> None:
    rows = [line.split(" | ") for line in TABLE.read_text().splitlines() if line.startswith("| ")][1:]
    rules = {name.removeprefix("| "): rules for name, rules, *_ in rows}
    assert sorted(rules) == sorted(LATER.union(VISION, (name for name in TYPES if name not in UNBUILT)))
    assert {name for name, found in rules.items() if found == "none"} == set(REFUSED)
    assert {name for name, found in rules.items() if found == "input"} == {*INPUT_ONLY, "gemma4", "qwen4_exp"}
    assert sum(found != "none" for name, found in rules.items() if name not in VISION) >= 129


def test_parts_of_a_vision_tower_are_never_taken() -> None:
    model = tiny_model("gemma3 (vision)")
    text = set(decoder_body(model).modules())
    assert all(module in text for site in ffn_sites(model) for module in (site.layer, *site.modules))
    assert any(isinstance(module, nn.ModuleList) for module in set(model.modules()) - text)


def test_layers_without_an_ffn_have_no_number() -> None:
    model = tiny_model("nemotron_h")
    profile = profile_of(model, "predicted-damage", 1e30)
    assert (model.config.num_hidden_layers, profile.model.n_layers) == (4, 2)
    with ffnskip.apply(model, profile, mode="score") as applied, torch.inference_mode():
        model(torch.arange(3, 9)[None], use_cache=False)
    assert applied.stats.skipped == [0, 6]
    assert applied.stats.skip_ratio == 0.5


def test_a_command_refuses_before_any_weights_are_loaded(
    pico_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pico_copy = Path(shutil.copytree(pico_folder, tmp_path / "copy"))
    tiny_model("mpt").config.save_pretrained(pico_copy)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("weights were loaded"))
    arguments = ("calibrate", pico_copy, "--target", 0.1, "-o", pico_copy / "p.yaml")
    assert (
        mistake(*arguments) == "Models of type 'mpt' cannot skip FFNs: their FFNs add the residual stream themselves."
    )
    tiny_model("doge").config.save_pretrained(pico_copy)
    assert "use --rule predicted-damage" in mistake(*arguments, "--rule", "cosine")
