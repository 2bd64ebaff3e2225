"""vLLM itself, on its CPU build, where that is installed: each family writes what `Decoder` writes."""

from pathlib import Path

import pytest
import torch
from support.factories import make_weights
from support.pico import pico_model, pico_profile, pico_tokens
from support.price import price_profile
from transformers import PreTrainedModel

from ffnskip import Decoder, Profile
from ffnskip.profiles.profile import save_profile
from ffnskip.profiles.schema import Compensation
from ffnskip.rules.predicted_damage import PROBE_BIAS
from ffnskip.vllm.through import OPERATOR, put, through

vllm = pytest.importorskip("vllm", reason="needs vLLM: docs/vllm.md")

# vLLM's attention wants heads of at least 32 channels. Limits and probes are far from what rounding changes.
SIZES = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
GEMMA = {"sliding_window": 8, "query_pre_attn_scalar": 32}
FAMILIES = {"llama": {}, "qwen2": {}, "qwen3": {}, "gemma3_text": GEMMA}
PROMPTS = [pico_tokens(length, seed=length)[0].tolist() for length in (5, 21, 40)]
NEW = 12


@pytest.fixture(autouse=True)
def small_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
    }.items():
        monkeypatch.setenv(name, value)


def damage_profile(model: PreTrainedModel) -> Profile:
    """With neurons, whose rows are those of the unfused model."""
    profile = pico_profile(model, rule="predicted-damage", threshold=1.0)
    profile = profile.model_copy(update={"compensation": Compensation(kind="low-rank", rank=3, neurons=4)})
    weights = make_weights(profile)
    weights.tensors[PROBE_BIAS].zero_()
    return profile.with_weights(weights)


@pytest.mark.parametrize("rule", ["price", "predicted-damage"])
@pytest.mark.parametrize("name", FAMILIES)
def test_vllm_writes_what_the_decoder_writes(name: str, rule: str, tmp_path: Path) -> None:
    model = pico_model(name, **SIZES | FAMILIES[name])
    profile = price_profile(model, warm_up=2) if rule == "price" else damage_profile(model)
    save_profile(profile, path := tmp_path / "profile.yaml")
    model.save_pretrained(folder := tmp_path / "model")
    decoder = Decoder(model, profile)
    prompts = [torch.tensor([prompt]) for prompt in PROMPTS]
    expected = [torch.cat(list(decoder.decode(prompt, max_new_tokens=NEW))).tolist() for prompt in prompts]

    llm = vllm.LLM(
        str(folder),
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=96,
        max_num_seqs=4,
        max_num_batched_tokens=16,
        block_size=32,
        enforce_eager=True,
        additional_config={"ffnskip_profile": str(path)},
    )
    greedy = vllm.SamplingParams(temperature=0.0, max_tokens=NEW, ignore_eos=True, detokenize=False)
    for _ in range(2):  # the second time, from the cache
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], greedy, use_tqdm=False)
        assert [list(output.outputs[0].token_ids) for output in outputs] == expected
    (stats,) = llm.collective_rpc("ffnskip_stats")
    assert stats["tokens"] == 2 * decoder.stats.tokens
    assert stats["skip_ratio"] == pytest.approx(decoder.stats.skip_ratio, abs=0.01)
    assert 0.0 < stats["skip_ratio"] < 1.0


def test_what_cannot_be_had_is_said_before_a_model_is_loaded(tmp_path: Path) -> None:
    model = pico_model("mistral", **SIZES)
    save_profile(price_profile(model), path := tmp_path / "profile.yaml")
    model.save_pretrained(folder := tmp_path / "model")
    with pytest.raises(Exception, match="In vLLM there are profiles for"):
        vllm.LLM(str(folder), skip_tokenizer_init=True, additional_config={"ffnskip_profile": str(path)})


def test_graphs_are_cut_at_the_operator() -> None:
    from vllm.compilation.partition_rules import should_split

    nodes: list[torch.fx.Node] = []

    def keep(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        nodes.extend(graph.graph.nodes)
        return graph

    put("here", lambda x: x)
    torch.compile(lambda x: through(x + 1, "here") * 2, backend=keep, fullgraph=True)(torch.ones(2, 2))
    assert sum(should_split(node, [OPERATOR]) for node in nodes) == 1
