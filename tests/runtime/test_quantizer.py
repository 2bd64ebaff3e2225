"""A profile in a transformers configuration: loaded with a model, saved with it, refused beside another method."""

import json
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import huggingface_hub
import pytest
import torch
from support.hub import cache_repository
from support.pico import pico_model, pico_profile, pico_tokens
from support.price import price_profile
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

import ffnskip
from ffnskip import FFNSkipConfig, FfnskipError, ProfileError

PROMPT = pico_tokens(9)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    pico_model().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    ffnskip.save_profile(price_profile(pico_model(), warm_up=3), tmp_path / "profiles" / "p.yaml")
    return tmp_path / "profiles" / "p.yaml"


def generate(model: PreTrainedModel) -> list[int]:
    return model.generate(PROMPT, max_new_tokens=20, do_sample=False, eos_token_id=None).tolist()


def expected(profile: Path) -> list[int]:
    model = pico_model()
    with ffnskip.apply(model, profile):
        return generate(model)


def test_a_model_is_loaded_with_its_profile_on(folder: Path, profile: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=FFNSkipConfig(profile))
    assert generate(model) == expected(profile) != generate(pico_model())
    assert model.hf_quantizer.applied.stats.skip_ratio > 0


def test_a_saved_model_brings_its_profile_along(folder: Path, profile: Path, tmp_path: Path) -> None:
    config = FFNSkipConfig(profile, threshold=2e-9)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    deepcopy(model).save_pretrained(tmp_path / "saved")
    assert config.profile == str(profile)
    for file in profile.parent.iterdir():
        file.unlink()
    (tmp_path / "saved").rename(tmp_path / "moved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "moved")
    assert generate(again) == generate(model)
    assert again.hf_quantizer.applied.profile.skip == model.hf_quantizer.applied.profile.skip
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name])


def test_a_model_on_the_hub_brings_its_profile_along(
    folder: Path, profile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=FFNSkipConfig(profile))
    model.save_pretrained(tmp_path / "saved")
    cache_repository(tmp_path / "hub", "org/skipping", tmp_path / "saved")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    again = AutoModelForCausalLM.from_pretrained("org/skipping", cache_dir=tmp_path / "hub")
    assert generate(again) == generate(model)


@pytest.mark.parametrize("imported", ["", "import ffnskip; ", "import transformers; import ffnskip; "])
def test_without_ffnskip_a_saved_model_is_dense_and_says_so(
    imported: str, folder: Path, profile: Path, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=FFNSkipConfig(profile))
    model.save_pretrained(tmp_path / "saved")
    code = (
        f"{imported}import torch; from transformers import AutoModelForCausalLM as auto; "
        f"model = auto.from_pretrained({str(tmp_path / 'saved')!r}); "
        f"print(model.generate(torch.tensor({PROMPT.tolist()}), max_new_tokens=20, do_sample=False, eos_token_id=None)"
        ".tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(generate(model if imported else pico_model()))
    assert ("Unknown quantization type, got ffnskip" in done.stderr) == (not imported)


def test_a_profile_of_another_model_is_refused(folder: Path, tmp_path: Path) -> None:
    ffnskip.save_profile(pico_profile(pico_model("qwen2")), tmp_path / "p.yaml")
    with pytest.raises(ProfileError, match="model_type is qwen2"):
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=FFNSkipConfig(tmp_path / "p.yaml"))


def test_another_method_beside_it_is_refused(folder: Path, profile: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=FFNSkipConfig(profile))
    model.save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match="FFNSkipConfig but you are passing a BitsAndBytesConfig"):
        AutoModelForCausalLM.from_pretrained(
            tmp_path / "saved", quantization_config=BitsAndBytesConfig(load_in_8bit=True)
        )


def test_a_saved_model_takes_the_profile_beside_it_and_no_other(
    folder: Path, profile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=FFNSkipConfig(profile))
    model.save_pretrained(tmp_path / "saved")
    ffnskip.save_profile(pico_profile(model, warm_up=77), tmp_path / "ffnskip.yaml")
    monkeypatch.chdir(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert again.hf_quantizer.applied.profile.skip == model.hf_quantizer.applied.profile.skip
    config = tmp_path / "saved" / "config.json"
    for name in ("/etc/hostname", "hf://org/repo/p.yaml", "../ffnskip.yaml"):
        settings = json.loads(config.read_text())
        settings["quantization_config"]["profile"] = name
        config.write_text(json.dumps(settings))
        with pytest.raises(ProfileError, match="does not lie beside it"):
            AutoModelForCausalLM.from_pretrained(tmp_path / "saved")


def test_a_model_whose_profile_was_taken_off_is_saved_as_a_plain_one(
    folder: Path, profile: Path, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=FFNSkipConfig(profile))
    with pytest.raises(FfnskipError, match="push_to_hub"):
        model.save_pretrained(tmp_path / "pushed", push_to_hub=True)
    generate(model)
    model.hf_quantizer.applied.remove()
    model.save_pretrained(tmp_path / "plain")
    assert not (tmp_path / "plain" / "ffnskip.yaml").exists()
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
