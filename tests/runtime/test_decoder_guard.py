"""A decoder notices what has changed since it was made, and refuses what it would get wrong."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.compiler import needs_compiler
from support.pico import pico_model, pico_profile, pico_tokens
from torch import Tensor, nn
from transformers import PreTrainedModel

from ffnskip import Decoder, FfnskipError, pack_weights
from ffnskip.fast import engine, fused_path

PROMPT, NEW = pico_tokens(8), 20


def decode(decoder: Decoder, prompts: Tensor = PROMPT, new: int = NEW, **options: object) -> list[list[int]]:
    return [step.tolist() for step in decoder.decode(prompts, max_new_tokens=new, **options)]  # type: ignore[arg-type]


def steered(module: nn.Module, args: object, output: Tensor) -> Tensor:
    return -2 * output


@needs_compiler
def test_a_hook_is_never_left_out() -> None:
    model = pico_model()
    decoder = Decoder(model)
    plain = decode(decoder)
    hook = model.model.layers[2].mlp.register_forward_hook(steered)
    with_hook = decode(decoder)
    assert decoder.path == "general"
    assert "hook on model.layers.2.mlp" in str(decoder.why_general)
    assert with_hook == decode(Decoder(model, path="general")) != plain
    assert Decoder(model).path == "general"
    with pytest.raises(FfnskipError, match="forward hook"):
        Decoder(model, path="fused")
    hook.remove()
    assert decode(decoder) == plain
    assert decoder.path == "fused"


@needs_compiler
def test_a_replaced_forward_method_is_called() -> None:
    model = pico_model()
    decoder = Decoder(model)
    ffn = model.model.layers[1].mlp
    ffn.forward = lambda x: torch.zeros_like(x)
    assert decode(decoder) == decode(Decoder(model, path="general"))
    assert "forward method was replaced on model.layers.1.mlp" in str(decoder.why_general)


def scale_a_norm(model: PreTrainedModel) -> None:
    model.model.layers[0].input_layernorm.weight.mul_(-2)


def load_others(model: PreTrainedModel) -> None:
    model.load_state_dict({name: tensor.roll(1, 0) for name, tensor in pico_model().state_dict().items()})


def replace_a_matrix(model: PreTrainedModel) -> None:
    matrix = model.model.layers[3].mlp.down_proj
    matrix.weight = nn.Parameter(torch.randn_like(matrix.weight))


def share_a_matrix(model: PreTrainedModel) -> None:
    layers = model.model.layers
    layers[3].mlp.down_proj.weight.data = layers[2].mlp.down_proj.weight.data


def convert(model: PreTrainedModel) -> None:
    model.double().float()
    model.model.layers[3].mlp.down_proj.weight.data.neg_()


@needs_compiler
@pytest.mark.parametrize("change", [scale_a_norm, load_others, replace_a_matrix, share_a_matrix, convert])
@torch.no_grad()
def test_changed_weights_are_read_anew(change: Callable[[PreTrainedModel], None]) -> None:
    model = pico_model()
    decoder = Decoder(model, path="fused")
    before = decode(decoder)
    change(model)
    after = decode(decoder)
    assert after == decode(Decoder(model, path="general")) != before


@needs_compiler
def test_weights_that_no_step_reads_any_more_send_a_decode_the_general_way() -> None:
    model = pico_model()
    decoder = Decoder(model)
    decode(decoder)
    model.half()
    decode(decoder)
    assert "float16" in str(decoder.why_general)


@needs_compiler
@pytest.mark.parametrize("format", [None, "int8"])
def test_decoders_of_one_model_do_not_read_it_again_and_again(format: str | None) -> None:
    model = pico_model()
    if format:
        pack_weights(model, format)  # type: ignore[arg-type]
    first, second = Decoder(model), Decoder(model)
    engines = first._fused, second._fused
    for decoder in (first, second, first):
        decode(decoder)
    assert (first._fused, second._fused) == engines


@needs_compiler
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_frequencies_that_have_grown_are_those_of_a_new_text_again(seed: int) -> None:
    model = pico_model(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0})
    prompt, new = pico_tokens(100, seed=seed), 28
    expected = model.generate(prompt, max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0)
    with torch.inference_mode():
        model(pico_tokens(200))
    decoder = Decoder(model, path="fused")
    assert [token for [token] in decode(decoder, prompt, new)] == expected[0, 100:].tolist()


@needs_compiler
def test_the_cache_grows_as_tokens_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_path, "ROOM", 4)
    monkeypatch.setattr(engine, "ROOM", 4)
    model = pico_model()
    decoder = Decoder(model, pico_profile(model, threshold=-1.0), path="fused")
    general = Decoder(model, pico_profile(model, threshold=-1.0), path="general")
    prompts = pico_tokens(9, batch=2)
    steps = decoder.decode(prompts, max_new_tokens=60)
    found = [next(steps).tolist()]
    assert decoder._fused is not None
    assert decoder._fused.step is not None
    assert decoder._fused.step.cache.capacity < 20
    found += [step.tolist() for step in steps]
    assert found == decode(general, prompts, 60)
    assert decoder.stats == general.stats


def test_padding_on_the_right_and_padding_without_a_mask_are_refused() -> None:
    model = pico_model()
    model.config.pad_token_id = 7
    decoder, prompts = Decoder(model), pico_tokens(6, batch=2)
    with pytest.raises(FfnskipError, match="padded on the right"):
        decode(decoder, prompts, attention_mask=torch.tensor([[1] * 6, [1] * 4 + [0] * 2]))
    prompts[0, :2] = 7
    prompts[1, 0] = 8
    with pytest.raises(FfnskipError, match="need their attention_mask"):
        decode(decoder, prompts)
    decode(decoder, prompts, attention_mask=(prompts != 7).long())


@pytest.mark.parametrize(
    "arguments",
    [
        {"input_ids": [[1, 2]]},
        {"input_ids": torch.tensor([1, 2])},
        {"input_ids": torch.zeros(1, 0, dtype=torch.long)},
        {"max_new_tokens": 2.5},
        {"stop_tokens": 5},
        {"sampling": 0.7},
        {"attention_mask": torch.ones(1, 3)},
    ],
    ids=str,
)
def test_arguments_of_another_type_are_refused_in_a_sentence(arguments: dict[str, object]) -> None:
    decoder = Decoder(pico_model())
    with pytest.raises(FfnskipError):
        list(decoder.decode(**({"input_ids": PROMPT, "max_new_tokens": 2} | arguments)))  # type: ignore[arg-type]


def test_a_threshold_needs_a_profile() -> None:
    for moved in ({"threshold": 0.3}, {"target": 0.2}):
        with pytest.raises(FfnskipError, match="there is none"):
            Decoder(pico_model(), **moved)  # type: ignore[arg-type]


def test_a_decode_that_is_left_off_leaves_nothing_on_the_model() -> None:
    model = pico_model()
    decoder = Decoder(model, pico_profile(model, threshold=-1.0, warm_up=0), path="general")
    dense = model.generate(PROMPT, max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0)
    expected = decode(decoder)
    left_off = decoder.decode(PROMPT, max_new_tokens=NEW)
    assert next(left_off).tolist() == expected[0]
    assert torch.equal(
        model.generate(PROMPT, max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0), dense
    )
    assert next(left_off).tolist() == expected[1]
    assert decode(decoder) == expected
    with pytest.raises(FfnskipError, match="Another decode"):
        next(left_off)
