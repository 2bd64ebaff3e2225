"""What ffnskip relies on in transformers, torch, accelerate and safetensors, one fact each.

When a new version breaks something, the test that fails here says what. The suite runs on the oldest transformers that
pyproject allows.
"""

import inspect
import re
import tomllib
from pathlib import Path

import pytest
import torch
from accelerate import dispatch_model
from accelerate.utils import align_module_device
from safetensors import deserialize
from safetensors.torch import save
from support.on_disk import bytes_as_tokens
from support.pico import PARALLEL, SUPPORTED, VOCABULARY, pico_model, pico_tokens
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

ROOT = Path(__file__).parents[2]


def test_the_suite_runs_on_the_oldest_transformers_that_is_allowed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (least,) = (re.sub(r"^transformers>=", "", name) for name in project["dependencies"] if name.startswith("transf"))
    assert re.search(rf"^transformers=={re.escape(least)}(\.0)?$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)


@pytest.mark.parametrize("name", SUPPORTED)
def test_a_model_names_its_parts(name: str) -> None:
    model = pico_model(name)
    config = model.config.get_text_config()
    assert config.num_hidden_layers == 6
    assert isinstance(config.tie_word_embeddings, bool)
    assert model.get_input_embeddings().num_embeddings == VOCABULARY
    assert isinstance(model.get_output_embeddings(), nn.Linear)
    assert any(isinstance(child, nn.ModuleList) and len(child) == 6 for child in model.get_decoder().children())


@pytest.mark.parametrize("name", ["llama", "gemma2", *PARALLEL[:1]])
def test_a_layer_returns_the_stream_and_takes_no_note_of_being_watched(name: str) -> None:
    model, seen = pico_model(name), []
    layer = model.get_decoder().layers[2]
    plain = model(pico_tokens(5)).logits
    hook = layer.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    assert torch.equal(model(pico_tokens(5)).logits, plain)
    hook.remove()
    (entered, left), *_ = seen
    left = left if isinstance(left, Tensor) else left[0]
    assert entered.shape == left.shape == (1, 5, 32)


@torch.inference_mode()
def test_a_cache_positions_and_a_limit_on_logits_are_arguments_of_a_pass() -> None:
    model, text = pico_model(), pico_tokens(8)
    whole, cache = model(text).logits, DynamicCache(config=model.config)
    for start, end in ((0, 5), (5, 6), (6, 8)):
        positions = torch.arange(start, end)[None]
        options = {"position_ids": positions, "past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
        last = model(text[:, start:end], **options).logits
        assert last.shape == (1, 1, VOCABULARY)
        assert torch.allclose(last[:, 0], whole[:, end - 1], atol=1e-5)
    assert cache.get_seq_length() == 8


def test_rotary_settings_are_one_mapping_and_the_frequencies_a_buffer() -> None:
    config = AutoConfig.for_model("llama", rope_theta=5e5)
    assert config.rope_parameters == {"rope_theta": 5e5, "rope_type": "default"}
    rotary = pico_model().model.rotary_emb
    assert {"inv_freq", "original_inv_freq", "attention_scaling"} <= {*dir(rotary)}
    assert "model.rotary_emb.inv_freq" not in pico_model().state_dict()


def test_a_gated_ffn_is_two_projections_an_activation_and_a_third() -> None:
    ffn, x = pico_model().model.layers[0].mlp, torch.randn(3, 32)
    assert torch.equal(ffn(x), ffn.down_proj(ffn.act_fn(ffn.gate_proj(x)) * ffn.up_proj(x)))


def test_loading_reports_what_was_missing_and_what_did_not_fit(tmp_path: Path) -> None:
    model = pico_model()
    state = {name: weight for name, weight in model.state_dict().items() if "layers.3.mlp.up_proj" not in name}
    state["model.norm.weight"] = torch.ones(5)
    model.save_pretrained(tmp_path, state_dict=state)
    options = {"output_loading_info": True, "ignore_mismatched_sizes": True, "local_files_only": True}
    _, report = AutoModelForCausalLM.from_pretrained(tmp_path, **options)
    assert [*report["missing_keys"]] == ["model.layers.3.mlp.up_proj.weight"]
    assert [name for name, *_ in report["mismatched_keys"]] == ["model.norm.weight"]


def test_a_chat_template_gives_input_ids() -> None:
    tokenizer = bytes_as_tokens()
    tokenizer.chat_template = "{{ messages[0].content }}"
    options = {"add_generation_prompt": True, "return_tensors": "pt"}
    found = tokenizer.apply_chat_template([{"role": "user", "content": "abc"}], **options)
    assert tokenizer.decode(found["input_ids"][0]) == "abc"


def test_generate_feeds_the_prompt_and_then_single_tokens() -> None:
    model, lengths = pico_model(), []
    hook = (
        model.get_decoder()
        .layers[0]
        .register_forward_hook(lambda module, args, output: lengths.append(args[0].shape[1]))
    )
    model.generate(pico_tokens(6), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    hook.remove()
    assert lengths == [6, 1, 1, 1]


def test_a_dispatched_model_says_where_its_parts_run_and_lends_them() -> None:
    model = dispatch_model(pico_model(), {"": "cpu"}, main_device="cpu", force_hooks=True)
    assert torch.device(model._hf_hook.execution_device) == torch.device("cpu")
    with align_module_device(model.lm_head):
        assert model.lm_head.weight.device.type == "cpu"


def test_a_weight_counts_what_is_written_to_it() -> None:
    weight = pico_model().model.norm.weight
    version, address = weight._version, weight.data_ptr()
    with torch.no_grad():
        weight.mul_(2)
    assert weight._version > version
    assert weight.data_ptr() == address


def test_a_module_lists_its_hooks_and_an_own_forward_wins() -> None:
    module = nn.Identity()
    hook = module.register_forward_hook(lambda *seen: None)
    assert len(module._forward_hooks) == 1
    hook.remove()
    assert not module._forward_hooks
    assert not module._forward_pre_hooks
    module.forward = lambda x: x + 1  # type: ignore[method-assign]
    assert module(1) == 2


def test_bfloat16_is_rounded_to_nearest_and_ties_to_even() -> None:
    values = torch.tensor([1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-8 + 2.0**-20])
    assert values.to(torch.bfloat16).tolist() == [1.0, 1 + 2.0**-6, 1 + 2.0**-7]


def test_the_processor_says_what_it_can() -> None:
    assert isinstance(torch.backends.cpu.get_cpu_capability(), str)
    assert isinstance(bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()), bool)
    assert "enable_gqa" in (torch.nn.functional.scaled_dot_product_attention.__doc__ or "")


def test_a_generator_of_ones_own_draws_the_same_everywhere() -> None:
    drawn = [torch.rand(3, generator=torch.Generator().manual_seed(0)).tolist() for _ in range(2)]
    assert drawn[0] == drawn[1] == pytest.approx([0.4962566, 0.7682218, 0.0884774])


def test_safetensors_are_read_from_bytes_without_torch_and_written_alike() -> None:
    tensors = {"b": torch.ones(2, dtype=torch.bfloat16), "a": torch.zeros(1, 3, dtype=torch.int64)}
    assert save(tensors) == save(dict(reversed(tensors.items())))
    found = {name: (of["dtype"], [*of["shape"]]) for name, of in deserialize(save(tensors))}
    assert found == {"a": ("I64", [1, 3]), "b": ("BF16", [2])}


def test_pretrained_models_take_what_is_passed_on_to_them() -> None:
    taken = inspect.signature(type(pico_model()).forward).parameters
    assert {"input_ids", "attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep"} <= {*taken}
