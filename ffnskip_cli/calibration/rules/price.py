"""Compile the rule `price`: its constants from a few backward passes, its values from the dense model.

The constants say what the parts of a model are worth. The derivatives come from the backward passes that the Fisher
matrices of a fit come from as well: labels are sampled from the model itself, and each input of a matrix gets the mean
square of its derivative. A few thousand tokens are enough, however long the text is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ffnskip.errors import FfnskipError, ProfileError
from ffnskip.general.thin import ffn_share
from ffnskip.model.parts import FFN_ROLES, Part, parts_of
from ffnskip.model.sites import decoder_body, ffn_sites, input_device
from ffnskip.profiles.profile import Profile
from ffnskip.profiles.schema import Parts
from ffnskip.profiles.weights import Weights
from ffnskip.rules.price import tensor_name
from ffnskip_cli.calibration.fit.gradients import sampled_log_likelihood
from ffnskip_cli.calibration.fit.stage import BACKWARD
from ffnskip_cli.calibration.lab import Lab, Sizes, Step
from ffnskip_cli.calibration.recording.file import Statistics
from ffnskip_cli.calibration.recording.record import Record, sample_size
from ffnskip_cli.calibration.rules.base import RuleCompiler, ablation_cost
from ffnskip_cli.calibration.threshold.solve import VERIFY_TOKENS, highest_ratio, solve_threshold

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ffnskip_cli.text.corpus import Corpus

_FIRST = 16  # position of each sequence from which derivatives count: the first tokens are unlike all others
PRICE_TOKENS = 8192  # that derivatives are taken of, at most
QUANTILES = 48  # of the prices of one token's FFN
_TINY = 1e-30


class PriceCompiler(RuleCompiler):
    """Takes the derivatives, then chooses the warm-up; what is recorded are the prices of the dense model's parts."""

    def run(self, lab: Lab, statistics: Statistics, fit_text: Corpus | None) -> tuple[Profile, Record]:
        """See `RuleCompiler`; raises UnsupportedModelError, too, for a model that is not made of plain matrices."""
        prices, sample = self._prices(lab, statistics.record.sequences), statistics.record.first(VERIFY_TOKENS)
        parts = Parts(**{part.role: part.width for part in parts_of(ffn_sites(lab.model)[0].layer)})
        draft = _with_prices(self.start(statistics, parts), prices)
        record = record_prices(lab, prices, sample.sequences, statistics.record.prompt_tokens)
        if self.frees_warm_up(sample):
            ratio = min(self.fit.ratio, highest_ratio(record, draft.skip))
            threshold = solve_threshold(record, draft.skip, ratio)
            draft = self.with_warm_up(lab, draft.with_threshold(threshold), sample, ratio)
        return draft, record

    def cost(self, sizes: Sizes) -> list[Step]:
        """See `RuleCompiler`."""
        return [
            Step("take gradients", BACKWARD * min(sizes.recorded, sample_size(PRICE_TOKENS, sizes.length))),
            Step("record prices", min(sizes.recorded, sample_size(VERIFY_TOKENS, sizes.length))),
            *ablation_cost(self.settings, sizes),
        ]

    def _prices(self, lab: Lab, sequences: Tensor) -> dict[str, Tensor]:
        sample = sequences[: sample_size(PRICE_TOKENS, sequences.shape[1])]
        first, seed = min(_FIRST, sample.shape[1] // 4), self.settings.seed
        key = ["prices", sample.tolist(), first, seed]
        return lab.journal.remember_tensors(key, lambda: take_prices(lab, sample, first, seed))


def _with_prices(draft: Profile, prices: dict[str, Tensor]) -> Profile:
    """The draft with the constants of its region."""
    region = slice(draft.skip.cold_s, draft.skip.cold_e)
    try:
        return draft.with_weights(Weights({name: c[region].to(torch.bfloat16) for name, c in prices.items()}))
    except ProfileError:
        raise FfnskipError("The gradients are not finite numbers: try another --dtype, such as float32.") from None


def take_prices(lab: Lab, sequences: Tensor, first: int, seed: int) -> dict[str, Tensor]:
    """Nats per FLOP and squared unit of each input: ``c`` of `ffnskip.rules.price`, for all layers.

    Args:
        lab: with the dense model.
        sequences: ``[n, length]``.
        first: the first position that counts.
        seed: of the sampled labels.

    Returns:
        By the name of the tensor, ``[n_layers, width]`` float32.
    """
    model = lab.model
    layers = [parts_of(site.layer) for site in ffn_sites(model)]
    squares = {(index, part.role): torch.zeros(part.width, dtype=torch.float64) for index, part in _each(layers)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for sequence in lab.track(sequences, "taking gradients", len(sequences)):
            for key, gradient in _input_gradients(model, layers, sequence).items():
                squares[key] += gradient[first:].double().square().sum(dim=0).cpu()
    tokens = len(sequences) * (sequences.shape[1] - first)
    return {
        tensor_name(part.role): torch.stack(
            [0.5 * squares[index, part.role] / (tokens * part.flops) for index in range(len(layers))]
        ).float()
        for part in layers[0]
    }


def record_prices(lab: Lab, prices: dict[str, Tensor], sequences: Tensor, prompt: int) -> Record:
    """What the rule goes by on the dense model.

    Args:
        lab: with the dense model.
        prices: from `take_prices`.
        sequences: ``[n, length]``.
        prompt: tokens at the start of each sequence that are not recorded.

    Returns:
        Values ``[n, length - prompt, n_layers, QUANTILES]`` float16: logarithms of the prices of each FFN's parts.
    """
    layers = [parts_of(site.layer) for site in ffn_sites(lab.model)]
    shares = {role: ffn_share(layers[0], role) for role in FFN_ROLES}
    inputs = round(QUANTILES * shares[FFN_ROLES[0]])
    counts = dict(zip(FFN_ROLES, (inputs, QUANTILES - inputs), strict=True))
    rows = []
    for sequence in lab.track(sequences, "recording prices", len(sequences)):
        seen: dict[tuple[int, str], Tensor] = {}

        def see(index: int, part: Part, x: Tensor, seen: dict[tuple[int, str], Tensor] = seen) -> None:
            if part.role in counts:
                c = prices[tensor_name(part.role)][index].to(x.device)
                value = (x.flatten(0, -2).float().square() * c).clamp(min=_TINY).log().sort(dim=-1).values
                steps = (torch.arange(counts[part.role]) + 0.5) / counts[part.role]
                seen[index, part.role] = value[:, (steps * part.width).long()].half().cpu()

        with torch.inference_mode(), _watched(layers, see):
            decoder_body(lab.model)(sequence[None].long().to(input_device(lab.model)), use_cache=False)
        layer_values = [torch.cat([seen[index, role] for role in FFN_ROLES], dim=-1) for index in range(len(layers))]
        rows.append(torch.stack(layer_values, dim=1)[prompt:])
    return Record(sequences, torch.stack(rows))


def _each(layers: list[list[Part]]) -> Iterator[tuple[int, Part]]:
    return ((index, part) for index, parts in enumerate(layers) for part in parts)


@contextmanager
def _watched(layers: list[list[Part]], see: Callable[[int, Part, Tensor], None]) -> Iterator[None]:
    """While inside, call ``see(layer, part, x)`` for the shared input ``x`` of each part."""
    hooks = [
        part.matrices[0].register_forward_pre_hook(
            lambda module, args, index=index, part=part: see(index, part, args[0])
        )
        for index, part in _each(layers)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _input_gradients(
    model: PreTrainedModel, layers: list[list[Part]], sequence: Tensor
) -> dict[tuple[int, str], Tensor]:
    """Derivatives of the log-likelihood of sampled labels by the inputs of each part, ``[length, width]``."""
    inputs: dict[tuple[int, str], list[Tensor]] = {}

    def enter(key: tuple[int, str]) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            x = args[0].view_as(args[0])  # a node of its own, so that only what these matrices do with it counts
            inputs.setdefault(key, []).append(x)
            return (x, *args[1:])

        return hook

    hooks = [
        matrix.register_forward_pre_hook(enter((index, part.role)))
        for index, part in _each(layers)
        for matrix in part.matrices
    ]
    try:
        with torch.enable_grad():
            log_likelihood = sampled_log_likelihood(model, sequence)
            keys = [(key, x) for key, tensors in inputs.items() for x in tensors]
            gradients = torch.autograd.grad(log_likelihood, [x for _, x in keys])
    finally:
        for hook in hooks:
            hook.remove()
    sums: dict[tuple[int, str], Tensor] = {}
    for (key, _), gradient in zip(keys, gradients, strict=True):
        flat = gradient.flatten(0, -2).float()
        sums[key] = sums[key] + flat if key in sums else flat
    return sums
