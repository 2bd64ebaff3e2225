"""What a token costs: FLOPs and bytes, from the shapes of a model's weights.

Only matrix products count, at 2 FLOPs per multiply-add, as `torch.utils.flop_counter` counts them; norms and
activations are left out. What a rule reads is charged although it may be none (`Rule.check_flops`). What a
profile saves is net of what it adds: checks or probes, and the compensation of every skipped FFN (`Overhead`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from ffnskip.compensation.kinds import weights_read
from ffnskip.model.packed import PackedLinear
from ffnskip.model.sites import decoder_body, ffn_sites
from ffnskip.profiles.identity import head_dim
from ffnskip.profiles.profile import Profile
from ffnskip.stats import SkipStats

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Overhead:
    """What a profile adds to the work of a token.

    Attributes:
        check_flops, check_bytes: of deciding on one FFN, for a token that may skip it.
        added_flops, added_bytes: of what is added in place of one skipped FFN.
    """

    check_flops: int
    check_bytes: int
    added_flops: int
    added_bytes: float


_WITHOUT_KEYS = ("linear_attention", "conv", "moe")  # of `layer_types`
_ATTENTION = ("self_attn", "attn", "attention", "self_attention")  # what a layer calls it
NO_OVERHEAD = Overhead(0, 0, 0, 0)


def overhead(profile: Profile, model: PreTrainedModel) -> Overhead:
    """What `profile` adds to the work of `model`, in whose dtype its weights are used."""
    hidden, rule = profile.model.hidden_size, profile.skip.by
    of_model, matrices, bias = weights_read(profile.compensation, hidden)
    return Overhead(
        check_flops=rule.check_flops(hidden, profile.part_widths),
        check_bytes=rule.check_weights(hidden, profile.part_widths) * model.dtype.itemsize,
        added_flops=2 * (of_model + matrices),
        added_bytes=of_model * model_cost(model).ffn_bytes_per_weight + (matrices + bias) * model.dtype.itemsize,
    )


@dataclass(frozen=True)
class ModelCost:
    """Costs of one token's forward pass.

    Attributes:
        n_layers: decoder layers.
        ffn_flops: of one layer's FFN.
        other_flops: of everything else but the attention scores: projections and output head.
        flops_per_key: of the attention scores and values, per cached position, summed over the layers.
        ffn_bytes: weights of one layer's FFN.
        all_bytes: all weights that a decoded token reads.
        bytes_per_key: of the key-value cache, per cached position, summed over the layers; in the model's dtype.
    """

    n_layers: int
    ffn_flops: float
    other_flops: float
    flops_per_key: int
    ffn_bytes: float
    all_bytes: float
    bytes_per_key: int

    @property
    def ffn_bytes_per_weight(self) -> float:
        """Of the FFNs' matrices: 2 in bfloat16, about 1 in int8."""
        return 2 * self.ffn_bytes / self.ffn_flops

    def dense_flops(self, first: int, last: int) -> float:
        """FLOPs of running the tokens at positions ``first .. last - 1`` of one sequence one by one."""
        keys = (last * (last + 1) - first * (first + 1)) // 2  # the token at position p attends to p + 1 keys
        return (last - first) * (self.n_layers * self.ffn_flops + self.other_flops) + keys * self.flops_per_key

    def ffn_share(self, first: int, last: int) -> float:
        """What the FFNs are of `dense_flops`."""
        return (last - first) * self.n_layers * self.ffn_flops / self.dense_flops(first, last)

    def saved_flops(self, stats: SkipStats, overhead: Overhead) -> float:
        """FLOPs of what was skipped or left out, minus those of the profile's own work; may be negative."""
        saved = sum(stats.skipped) * (self.ffn_flops - overhead.added_flops)
        saved += sum(stats.left_out) * self.ffn_flops + stats.attention_flops
        return saved - sum(stats.checked) * overhead.check_flops

    def saved_share(self, stats: SkipStats, overhead: Overhead, sequences: int, length: int) -> float:
        """flops_saved of scored sequences, each taken as one decode of `length` tokens without a prompt."""
        return self.saved_flops(stats, overhead) / (sequences * self.dense_flops(0, length))

    def saved_share_past(self, stats: SkipStats, overhead: Overhead, sequences: int, length: int) -> float:
        """The same of the tokens past warm-up alone."""
        first = length - stats.tokens // sequences
        return self.saved_flops(stats, overhead) / (sequences * self.dense_flops(first, length))

    def ceiling(self, stats: SkipStats, overhead: Overhead, keys: float) -> float:
        """The speed-up past warm-up, at batch 1, if time went by bytes alone: those read dense / with the profile.

        Both read the key-value cache, which stays whole. With the profile, a checked FFN reads its probe, and a skipped
        one the weights of the compensation instead of its own.

        Args:
            stats: what was skipped in the decodes.
            overhead: of the profile.
            keys: cached positions that a token attends to, the mean over the tokens past warm-up. Sliding windows are
                not taken off.
        """
        if not stats.tokens:
            return 1.0
        saved = sum(stats.skipped) * (self.ffn_bytes - overhead.added_bytes)
        saved += sum(stats.left_out) * self.ffn_bytes + stats.attention_flops / 2 * self.ffn_bytes_per_weight
        saved -= sum(stats.checked) * overhead.check_bytes
        dense = self.all_bytes + keys * self.bytes_per_key
        return dense / (dense - saved / stats.tokens)


@dataclass(frozen=True)
class LayerCost:
    """Costs of one whole decoder layer for one token.

    Attributes:
        flops: of the matrices of its FFN and its attention.
        flops_per_key: of the attention scores and values, per cached position.
    """

    flops: float
    flops_per_key: float


def layer_costs(model: PreTrainedModel) -> list[LayerCost]:
    """Of each decoder layer with an FFN; of those with attention, each has an equal share of that over the keys."""
    config, layers = model.config.get_text_config(), [site.layer for site in ffn_sites(model)]
    attends = [any(getattr(layer, name, None) is not None for name in _ATTENTION) for layer in layers]
    per_key = model_cost(model).flops_per_key / max(sum(attends), 1)
    return [
        LayerCost(_weights(layer, config).flops, per_key if attending else 0.0)
        for layer, attending in zip(layers, attends, strict=True)
    ]


def mean_keys(prompt_tokens: int, new_tokens: int) -> float:
    """Cached positions that a decode's step attends to, its own among them: the mean over all of its steps.

    There is one step fewer than new tokens, as the last one is not fed back.
    """
    return prompt_tokens + new_tokens / 2


def model_cost(model: PreTrainedModel) -> ModelCost:
    """The costs of `model`, which may live on the meta device.

    A mixture of experts is charged for the experts that a token is routed to, a model that sees pictures for its text
    side.
    """
    config = model.config.get_text_config()
    ffns = [_weights(nn.ModuleList(site.parts), config) for site in ffn_sites(model)]
    everything = _weights(nn.ModuleList([decoder_body(model), model.get_output_embeddings()]), config)
    layers = _with_keys(config)
    per_layer = _Weights(sum(w.flops for w in ffns) / len(ffns), sum(w.bytes for w in ffns) / len(ffns))
    return ModelCost(
        n_layers=len(ffns),
        ffn_flops=per_layer.flops,
        other_flops=everything.flops - per_layer.flops * len(ffns),
        flops_per_key=sum(4 * layer.num_attention_heads * (head_dim(layer) or 0) for layer in layers),
        ffn_bytes=per_layer.bytes,
        all_bytes=everything.bytes,
        bytes_per_key=sum(2 * _kv_heads(layer) * (head_dim(layer) or 0) for layer in layers) * model.dtype.itemsize,
    )


@dataclass(frozen=True)
class _Weights:
    flops: float
    bytes: float


def _weights(root: nn.Module, config: object) -> _Weights:
    """Matrix products below `root`: FLOPs per token, and bytes read. Embedding tables are looked up, not multiplied."""
    routed = _routed_fraction(config)
    flops = read = 0.0
    for module in root.modules():
        if isinstance(module, nn.Embedding):
            continue
        if isinstance(module, PackedLinear):
            flops += 2 * module.matrix.rows * module.matrix.columns
            read += module.matrix.nbytes
        for weight in module.parameters(recurse=False):
            if weight.dim() < 2:
                continue
            share = routed if weight.dim() == 3 else 1.0  # experts are stored as one [experts, out, in] tensor
            flops += 2 * weight.numel() * share
            read += weight.numel() * weight.element_size() * share
    return _Weights(flops, read)


def _with_keys(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    """The configuration of each layer that has a key-value cache: in hybrids, some have a state of fixed size."""
    if getattr(config, "is_heterogeneous", False):  # Gemma 4 has wider heads in some layers
        return list(config.per_layer_config)
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    return [config for kind in kinds if kind not in _WITHOUT_KEYS]


def _kv_heads(config: PreTrainedConfig) -> int:
    """Heads whose keys and values are cached."""
    if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):
        return 1  # an older Falcon
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def _routed_fraction(config: object) -> float:
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None) or 1
    return getattr(config, "num_experts_per_tok", experts) / experts if experts > 1 else 1.0
