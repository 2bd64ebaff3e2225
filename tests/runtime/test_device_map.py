"""Models that accelerate has spread over devices: there is one device here, so memory is made too short instead."""

from collections.abc import Callable
from pathlib import Path

import accelerate
import pytest
import torch
from support.cli import mistake, succeed, talk
from support.pico import feed, middle_threshold, pico_model, pico_profile, pico_tokens
from torch import Tensor
from transformers import PreTrainedModel

import ffnskip
from ffnskip import Decoder
from ffnskip.decode import GeneralPath, generate_tokens
from ffnskip.model.sites import input_device, watch
from ffnskip.profiles.profile import save_profile
from ffnskip_cli.measure.flops import model_cost
from ffnskip_cli.measure.quality import measure_quality
from ffnskip_cli.measure.worst_case import continue_prompts
from ffnskip_cli.progress import silently
from ffnskip_cli.sources.models import load_model

TEXT = pico_tokens(12, batch=2)


def spread(model: PreTrainedModel, folder: Path) -> None:
    """Every other layer on disk, and the embeddings too."""
    layers = {f"model.layers.{layer}": "disk" if layer % 2 else "cpu" for layer in range(6)}
    rest = {"model.embed_tokens": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    accelerate.dispatch_model(model, layers | rest, offload_dir=folder)


OFFLOADED: dict[str, Callable[[PreTrainedModel, Path], object]] = {
    "to-cpu": lambda model, folder: accelerate.cpu_offload(model),
    "to-disk": lambda model, folder: accelerate.disk_offload(model, folder),
    "spread": spread,
}


@pytest.fixture(params=OFFLOADED.values(), ids=OFFLOADED)
def whole_and_offloaded(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[PreTrainedModel, PreTrainedModel]:
    whole, offloaded = pico_model(), pico_model()
    request.param(offloaded, tmp_path)
    assert offloaded.device.type == "meta"
    return whole, offloaded


def test_an_offloaded_model_is_watched_decodes_and_measures_the_same(
    whole_and_offloaded: tuple[PreTrainedModel, PreTrainedModel],
) -> None:
    threshold = middle_threshold(whole_and_offloaded[0], TEXT)
    tensors: list[list[Tensor]] = []
    figures: list[tuple[object, ...]] = []
    for model in whole_and_offloaded:
        assert input_device(model) == torch.device("cpu")
        seen: list[Tensor] = []
        with torch.inference_mode(), watch(model, lambda layer, h, f, seen=seen: seen.extend((h, f))):
            model(TEXT, use_cache=False)
        profile = pico_profile(model, threshold=threshold)
        (quality,) = measure_quality(model, [profile], TEXT, silently)
        continued = continue_prompts(Decoder(model, profile), TEXT, 8, silently)
        with ffnskip.apply(model, profile, path="general") as applied:
            tokens = torch.stack(list(generate_tokens(GeneralPath(model), TEXT, max_new_tokens=8)))
            logits = feed(model, TEXT, prompt=4)
        tensors.append([*seen, tokens, logits, continued.tokens])
        figures.append((applied.stats, quality, model_cost(model)))
        assert (len(seen), applied.stats.skip_ratio > 0) == (12, True)
    assert all(map(torch.equal, *tensors))
    assert figures[0] == figures[1]


@pytest.fixture
def short_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Too little memory is found for a pico model, so that most of it is left on disk."""
    monkeypatch.setattr("transformers.integrations.accelerate.get_max_memory", lambda given=None: {"cpu": 100_000})


@pytest.mark.parametrize("device_map", ["auto", "balanced", "sequential"])
def test_a_device_map_leaves_on_disk_what_does_not_fit(
    plateau_folder: Path, device_map: str, short_of_memory: None
) -> None:
    whole = load_model(str(plateau_folder))
    spread = load_model(str(plateau_folder), device_map=device_map)
    assert (whole.placement, spread.placement) == ("cpu", "cpu, disk")
    assert not any(parameter.requires_grad for parameter in spread.model.parameters())
    with torch.inference_mode():
        assert torch.equal(spread.model(TEXT).logits, whole.model(TEXT).logits)


def test_commands_give_the_same_answer_with_a_device_map(
    plateau_folder: Path, tmp_path: Path, text_file: Path, short_of_memory: None
) -> None:
    model = load_model(str(plateau_folder)).model
    profile = tmp_path / "p.yaml"
    save_profile(pico_profile(model, cold_s=1, cold_e=7, threshold=0.9, warm_up=4), profile)
    sizes = ("--prompt-tokens", 8, "--new-tokens", 8, "--prompts", 2, "--eval-tokens", 600, "-r", 1)
    quality = ("--measure", "quality,worst-case", "--eval-dataset", text_file, *sizes)
    for command in (
        ("apply", plateau_folder, profile),
        ("generate", plateau_folder, "abc", "--max-new-tokens", 8, "--profile", profile),
        ("bench", plateau_folder, "--profile", profile, *quality),
    ):
        spread = succeed(*command, "--device-map", "auto")
        assert spread.stdout == succeed(*command).stdout
        assert "The model lies on cpu, disk." in talk(spread)


def test_a_device_map_takes_one_device_whole_and_excludes_a_device(plateau_folder: Path) -> None:
    assert load_model(str(plateau_folder), device_map="auto").placement == "cpu"
    sentence = mistake("generate", plateau_folder, "abc", "--device-map", "auto", "--device", "cpu")
    assert sentence == "--device-map auto chooses the devices itself: leave --device cpu out"
