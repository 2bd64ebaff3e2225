"""ShortGPT and SkipDecode against their definitions: layers deleted, and token by token with a cache of each layer."""

from copy import deepcopy
from functools import cache
from itertools import pairwise

import pytest
import torch
from support.opponents import field, opponent
from support.pico import N_LAYERS, float64_model, pico_tokens
from torch import Tensor, nn
from transformers import DynamicCache

from ffnskip.errors import FfnskipError
from ffnskip_cli.measure.flops import NO_OVERHEAD, layer_costs, model_cost
from ffnskip_cli.measure.quality import measure_quality
from ffnskip_cli.opponents import OPPONENTS
from ffnskip_cli.opponents.depth import Depth, block_similarities
from ffnskip_cli.progress import silently

MODEL = float64_model()
WARM_UP, LENGTH, SAVED = 3, 24, 0.3
TEXT = pico_tokens(LENGTH, batch=3)


@cache
def depth(name: str, saved: float = SAVED) -> Depth:
    way = opponent(name, MODEL, TEXT, saved, warm_up=WARM_UP).way
    assert isinstance(way, Depth)
    return way


@torch.inference_mode()
def logits(way: Depth) -> Tensor:
    profile = field(MODEL, TEXT, SAVED, warm_up=WARM_UP).profile
    with way.applied(MODEL, profile, TEXT[0]):
        found: Tensor = MODEL(TEXT[:1], use_cache=False).logits[0]
    return found


class PassedBy(nn.Module):
    """Stands where a layer is left out."""

    def forward(self, hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor:
        return hidden_states


@torch.inference_mode()
def test_shortgpt_is_the_model_without_the_layers_of_the_lowest_block_influence() -> None:
    states = MODEL(TEXT, output_hidden_states=True).hidden_states  # the last one is behind the final norm
    influence = []
    for entered, left in pairwise(states[:-1]):
        a, b = entered[:, WARM_UP:], left[:, WARM_UP:]
        influence.append(1 - float(((a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))).mean()))
    blocks = block_similarities(field(MODEL, TEXT, SAVED, warm_up=WARM_UP))
    assert blocks[:-1] == pytest.approx([1 - value for value in influence])
    order = depth("shortgpt").order
    assert list(order) == sorted(range(N_LAYERS), key=lambda layer: -blocks[layer])
    short = deepcopy(MODEL)
    short.model.layers = nn.ModuleList(
        layer for index, layer in enumerate(short.model.layers) if index not in order[:2]
    )
    expected = short(TEXT[:1], use_cache=False).logits[0]
    assert torch.equal(logits(Depth(order, 2.0, grows=False)), expected)


@pytest.mark.parametrize("name", ["shortgpt", "skipdecode"])
@torch.inference_mode()
def test_token_by_token_a_layer_that_is_left_out_caches_nothing_and_nobody_misses_it(name: str) -> None:
    way = depth(name)
    left_out = way.left_out(WARM_UP, LENGTH, N_LAYERS)
    assert bool((left_out[1:] >= left_out[:-1]).all())
    model, cache_, expected = deepcopy(MODEL), DynamicCache(), []
    whole = list(model.model.layers)
    for position, token in enumerate(TEXT[0]):
        for layer in range(N_LAYERS):
            model.model.layers[layer] = PassedBy() if left_out[position, layer] else whole[layer]
        where = torch.tensor([[position]])
        expected.append(model(token[None, None], past_key_values=cache_, position_ids=where).logits[0, -1])
    lengths = [cache_.get_seq_length(layer) for layer in range(N_LAYERS)]
    assert lengths == (~left_out).sum(0).tolist()
    assert torch.allclose(logits(way), torch.stack(expected))


@pytest.mark.parametrize("name", ["shortgpt", "skipdecode"])
@pytest.mark.parametrize("saved", [0.1, 0.3, 0.5])
def test_each_saves_what_it_was_asked_for(name: str, saved: float) -> None:
    found = opponent(name, MODEL, TEXT, saved, warm_up=WARM_UP)
    (quality,) = measure_quality(MODEL, [found.profile], TEXT, silently, ways=[found.way])
    reached = model_cost(MODEL).saved_share_past(quality.stats, NO_OVERHEAD, len(TEXT), LENGTH)
    assert reached == pytest.approx(saved, abs=0.02)  # a layer at one position more or less


def test_skipdecode_leaves_out_more_the_later_the_token_from_the_second_layer_up() -> None:
    way = depth("skipdecode")
    assert way.order == (1, 2, 3, 4, 5)
    counts = way.counts(WARM_UP, LENGTH)
    assert counts[:WARM_UP].tolist() == [0] * WARM_UP
    ideal = torch.linspace(0.0, 2 * way.mean, LENGTH - WARM_UP, dtype=torch.float64)
    assert float((counts[WARM_UP:] - ideal).abs().max()) <= 0.5


def test_a_whole_layer_costs_its_matrices_and_its_attention_over_the_keys() -> None:
    cost, layers = model_cost(MODEL), layer_costs(MODEL)
    assert len(layers) == N_LAYERS
    head = 2 * MODEL.lm_head.weight.numel()
    assert sum(layer.flops for layer in layers) + head == cost.n_layers * cost.ffn_flops + cost.other_flops
    assert sum(layer.flops_per_key for layer in layers) == cost.flops_per_key


def test_more_than_all_layers_cost_is_out_of_reach() -> None:
    with pytest.raises(FfnskipError, match="it saves at most"):
        OPPONENTS["shortgpt"](field(MODEL, TEXT, 0.99, warm_up=WARM_UP))
