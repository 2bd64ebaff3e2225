"""Decoding with settings drawn at random: the fused path, the general one and the rules written out agree."""

from dataclasses import dataclass, field
from functools import cache

import torch
from hypothesis import given
from hypothesis import strategies as st
from support.compiler import needs_compiler
from support.examples import few
from support.factories import KINDS, Kind, make_compensated
from support.naive import naive_forward
from support.pico import N_LAYERS, dense_similarities, float64_model, pico_model, pico_profile, pico_tokens
from torch import Tensor
from transformers import PreTrainedModel

from ffnskip import Decoder, Profile, Sampling, SkipStats

model_of = cache(pico_model)


@dataclass(frozen=True)
class Case:
    """One profile and one decode."""

    rule: str
    kind: tuple[Kind, int | None, int]
    share: float  # of the similarities that are above the threshold, or nats
    region: tuple[int, int]
    warm_up: int
    window: int | None
    refresh: int | None
    prompt: int
    batch: int
    new: int
    seed: int
    padding: int = 0
    stop: frozenset[int] = field(default=frozenset())
    temperature: float = 0.0

    def profile(self, model: PreTrainedModel) -> Profile:
        kind, rank, neurons = self.kind
        own = pico_profile(model).model.model_dump()
        cold_s, cold_e = self.region
        threshold, window = 2 * self.share, None
        if self.rule == "cosine":
            similarities = dense_similarities(model, pico_tokens(20)).flatten()
            threshold, window = float(similarities.quantile(1 - self.share)) + 1e-4, self.window
        settings = {"cold_s": cold_s, "cold_e": cold_e, "warm_up": self.warm_up, "refresh_every": self.refresh}
        settings |= {"threshold": threshold, "window": window}
        return make_compensated(kind, rule=self.rule, rank=rank, neurons=neurons, **settings, **own)

    @property
    def prompts(self) -> Tensor:
        return pico_tokens(self.prompt, self.batch, self.seed)


CASES = st.builds(
    Case,
    rule=st.sampled_from(["cosine", "predicted-damage"]),
    kind=st.sampled_from(KINDS),
    share=st.floats(0.05, 0.95),
    region=st.tuples(st.integers(0, 3), st.integers(4, N_LAYERS)),
    warm_up=st.integers(0, 6),
    window=st.none() | st.integers(1, 3),
    refresh=st.none() | st.integers(2, 5),
    prompt=st.integers(1, 12),
    batch=st.integers(1, 3),
    new=st.integers(1, 20),
    seed=st.integers(0, 9),
    padding=st.integers(0, 3),
    stop=st.frozensets(st.integers(3, 60), max_size=20),
    temperature=st.sampled_from([0.0, 0.0, 0.7]),
)


def decode(decoder: Decoder, case: Case) -> tuple[list[list[int]], SkipStats]:
    mask = torch.ones_like(case.prompts)
    mask[-1, : min(case.padding, case.prompt - 1)] = 0
    options = {"sampling": Sampling(case.temperature, seed=case.seed), "stop_tokens": case.stop}
    steps = decoder.decode(case.prompts, max_new_tokens=case.new, attention_mask=mask, **options)  # type: ignore[arg-type]
    return [step.tolist() for step in steps], decoder.stats


@needs_compiler
@few
@given(case=CASES, family=st.sampled_from(["llama", "qwen3", "gemma2", "mistral"]))
def test_the_fused_path_decodes_as_the_general_one(case: Case, family: str) -> None:
    model = model_of(family)
    profile = case.profile(model)
    fused, general = (Decoder(model, profile, path=path) for path in ("fused", "general"))
    assert decode(fused, case) == decode(general, case)


@few
@given(case=CASES)
def test_the_general_path_decodes_as_the_rules_say(case: Case) -> None:
    """Row by row and token by token; padding, stopping and sampling are those of the test above."""
    model = float64_model()
    profile = case.profile(model)
    for prompt in case.prompts:
        decoder = Decoder(model, profile, path="general")
        tokens = torch.cat(list(decoder.decode(prompt[None], max_new_tokens=case.new)))
        naive = naive_forward(model, torch.cat([prompt, tokens[:-1]]), profile.skip, case.prompt, profile.weights)
        assert naive.logits[case.prompt - 1 :].argmax(dim=-1).tolist() == tokens.tolist()
        assert decoder.stats.skipped == naive.skipped.sum(dim=0).tolist()
