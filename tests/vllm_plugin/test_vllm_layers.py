"""What the plugin for vLLM puts on layers, against the general path: on Phi-3, whose matrices are fused as in vLLM."""

from collections.abc import Callable

import pytest
import torch
from support.factories import make_compensated, make_weights
from support.pico import N_LAYERS, pico_model, pico_profile, pico_tokens
from support.price import price_profile
from torch import Tensor, nn
from transformers import PreTrainedModel

import ffnskip
from ffnskip import Profile, SkipStats, UnsupportedModelError
from ffnskip.general.walk import Walk
from ffnskip.model.sites import ffn_sites
from ffnskip.profiles.schema import Compensation
from ffnskip.rules.predicted_damage import PROBE_BIAS
from ffnskip.vllm.layers import put_on
from ffnskip.vllm.requests import generated_before
from ffnskip.vllm.through import put, through

PROMPTS, LENGTH = (5, 3, 7), 12
TEXT = pico_tokens(LENGTH, batch=len(PROMPTS))


def fused_model() -> PreTrainedModel:
    """Whose matrices say how large this rank's share is, which is all of it."""
    model = pico_model("phi3", torch.float64)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.input_size_per_partition, module.output_size_per_partition = module.in_features, module.out_features
    return model


def damage_profile(model: PreTrainedModel) -> Profile:
    """Skips about half of the FFNs."""
    profile = pico_profile(model, rule="predicted-damage", threshold=1.0)
    profile = profile.model_copy(update={"compensation": Compensation(kind="linear")})
    weights = make_weights(profile)
    weights.tensors[PROBE_BIAS].zero_()
    return profile.with_weights(weights)


def price(model: PreTrainedModel) -> Profile:
    return price_profile(model, warm_up=2)


each_rule = pytest.mark.parametrize("make", [damage_profile, price], ids=["predicted-damage", "price"])


def put_on_all(model: PreTrainedModel, profile: Profile) -> Walk:
    walk = Walk(profile.skip, "decode", SkipStats(N_LAYERS))
    put_on(profile, list(model.model.layers), [site.ffn for site in ffn_sites(model)], walk)
    return walk


@torch.inference_mode()
def batch_pass(model: PreTrainedModel, walk: Walk) -> Tensor:
    """Logits of one pass over the whole of several requests whose prompts have different lengths."""
    positions = torch.arange(LENGTH).repeat(len(PROMPTS))
    index, real = generated_before(positions, PROMPTS, range(0, TEXT.numel() + 1, LENGTH))
    walk.begin(index, real, TEXT.numel())
    logits: Tensor = model(TEXT, use_cache=False).logits
    walk.end()
    return logits


@each_rule
def test_requests_of_a_batch_skip_as_each_does_alone_on_the_general_path(
    make: Callable[[PreTrainedModel], Profile],
) -> None:
    model = fused_model()
    profile = make(model)
    expected, stats = [], SkipStats(N_LAYERS)
    for text, prompt in zip(TEXT, PROMPTS, strict=True):
        alone = profile.with_skip(warm_up=prompt + profile.skip.warm_up)
        with ffnskip.apply(model, alone, mode="score") as applied, torch.inference_mode():
            expected.append(model(text[None], use_cache=False).logits[0])
        stats.add(applied.stats)
    walk = put_on_all(model, profile)
    assert torch.allclose(batch_pass(model, walk), torch.stack(expected), atol=1e-9)
    assert walk.stats.tokens == stats.tokens
    assert 0.0 < walk.stats.skip_ratio < 1.0
    assert walk.stats.skip_ratio == pytest.approx(stats.skip_ratio)


@each_rule
def test_nothing_skips_outside_of_a_batch_of_requests(make: Callable[[PreTrainedModel], Profile]) -> None:
    model = fused_model()
    dense = model(TEXT, use_cache=False).logits
    put_on_all(model, make(model))
    assert torch.equal(model(TEXT, use_cache=False).logits, dense)


@pytest.mark.parametrize("threshold", [0.0, 1e9], ids=["none", "all"])
def test_rows_that_all_decide_alike_need_no_gathering(threshold: float) -> None:
    model = fused_model()
    profile = damage_profile(model).with_threshold(threshold).with_skip(warm_up=0)
    walk = put_on_all(model, profile)
    mlp = model.model.layers[2].mlp
    x = torch.randn(4, mlp.down_proj.out_features, dtype=torch.float64)
    dense = mlp(x)
    walk.begin(torch.zeros(1, 4, dtype=torch.long), None, 4)
    assert torch.equal(mlp(x), dense) == (threshold == 0.0)
    walk.end()
    assert walk.stats.skipped[2] == (0 if threshold == 0.0 else 4)


class Share(nn.Module):
    """One rank's share of a matrix whose inputs are shared out, as vLLM's `RowParallelLinear` before the all-reduce."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight
        self.output_size_per_partition, self.input_size_per_partition = weight.shape

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return x @ self.weight.T, None


def test_the_shares_of_tensor_parallel_ranks_add_up_to_the_whole() -> None:
    model, ranks = fused_model(), 2
    profile = price_profile(model, cold_s=0, cold_e=1)
    down = model.model.layers[0].mlp.down_proj
    x = torch.randn(9, down.in_features, dtype=torch.float64)

    def leave_out(layers: list[nn.Module], inputs: Tensor, rank: int, ranks: int) -> tuple[Tensor, SkipStats]:
        walk = Walk(profile.skip, "decode", SkipStats(N_LAYERS))
        put_on(profile, layers, [], walk, rank, ranks)
        walk.begin(torch.zeros(1, 9, dtype=torch.long), None, 9)
        output = layers[0].mlp.down_proj(inputs)
        walk.end()
        return output if isinstance(output, Tensor) else output[0], walk.stats

    shares = []
    for rank in range(ranks):
        shared = fused_model().model.layers
        for block, name in ((shared[0].mlp, "down_proj"), (shared[0].self_attn, "o_proj")):
            setattr(block, name, Share(getattr(block, name).weight.chunk(ranks, dim=1)[rank]))
        shared[0].mlp.gate_up_proj.output_size_per_partition //= ranks
        shares.append(leave_out(list(shared), x.chunk(ranks, dim=1)[rank], rank, ranks))
    whole, stats = leave_out(list(model.model.layers), x, 0, 1)
    assert torch.allclose(sum(output for output, _ in shares), whole)  # type: ignore[arg-type]
    assert not torch.allclose(whole, x @ down.weight.T)
    assert sum(s.left_out[0] for _, s in shares) / ranks == pytest.approx(stats.left_out[0])


def test_the_rule_cosine_is_refused_in_one_sentence() -> None:
    model, profile = fused_model(), make_compensated("mean")
    walk = Walk(profile.skip, "decode", SkipStats(N_LAYERS))
    with pytest.raises(UnsupportedModelError, match=r"^The rule cosine [^\n]+\.$"):
        put_on(profile, list(model.model.layers), [], walk)


@pytest.mark.parametrize("chunks", [[(0, 7)], [(0, 3), (3, 7)], [(2, 7)]], ids=["whole", "in chunks", "partly cached"])
def test_a_token_was_generated_if_it_lies_behind_its_prompt(chunks: list[tuple[int, int]]) -> None:
    seen = {}
    for first, last in chunks:  # beside another request, which generates, and padding
        positions = torch.tensor([20, *range(first, last), 0, 0])
        index, real = generated_before(positions, [18, 4], [0, 1, 1 + last - first])
        assert index[0, 0] == 2
        assert real[0].tolist() == [True] * (1 + last - first) + [False] * 2
        seen |= dict(zip(range(first, last), index[0, 1:-2].tolist(), strict=True))
    assert seen == {position: position - 4 for position in seen}


@pytest.mark.parametrize("compiled", [False, True])
def test_what_decides_is_no_part_of_a_graph(compiled: bool) -> None:
    """The graph is traced once, while nothing skips; what it meets later is decided then."""
    factor = [1.0]
    put("here", lambda x: x * factor[0] if bool(x.sum() > 0) else x)

    def layer(x: Tensor) -> Tensor:
        return through(x + 1, "here") - 1

    run = torch.compile(layer, fullgraph=True, backend="aot_eager") if compiled else layer
    x = torch.ones(3, 2)
    assert torch.equal(run(x), x)
    factor[0] = 2.0
    assert torch.equal(run(x), 2 * (x + 1) - 1)
    assert torch.equal(run(-3 * x), -3 * x)
