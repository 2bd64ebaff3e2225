"""The decode step of Triton kernels gives the model's own logits, skips what the runtime skips, and counts the same."""

import subprocess
import sys
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import cache
from typing import Any

import pytest
import torch
from support.factories import make_compensated
from support.pico import dense_similarities, pico_model, pico_tokens
from support.price import price_profile
from support.triton_device import DEVICE
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import ffnskip
from ffnskip.errors import FfnskipError, UnsupportedModelError
from ffnskip.fast.cache import KeyValueCache
from ffnskip.fast.cuda.cuda_step import CudaStep
from ffnskip.fast.families import FAMILIES, fuse
from ffnskip.fast.parts import leaves_out_parts
from ffnskip.fast.skipping import fuse_profile
from ffnskip.model.packed import pack_weights
from ffnskip.profiles.identity import model_info
from ffnskip.profiles.profile import Profile
from ffnskip.stats import SkipStats

BATCH, LAYERS, PROMPT, NEW = 2, 3, 10, 2
SIZES = {"num_hidden_layers": LAYERS, "num_attention_heads": 2, "num_key_value_heads": 1}  # few programs to interpret
WINDOW_OF_5 = {"sliding_window": 5}
TYPES = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], **WINDOW_OF_5}
CONFIGS: dict[str, dict[str, Any]] = {"mistral": WINDOW_OF_5, "gemma2": TYPES, "gemma3_text": TYPES}
TEXT = pico_tokens(PROMPT + NEW, batch=BATCH).to(DEVICE)
RUNNING = torch.zeros(BATCH, dtype=torch.bool)  # no row has ended
MASK = torch.ones(BATCH, PROMPT + NEW, dtype=torch.long, device=DEVICE)
MASK[1, :3] = 0  # the second prompt is shorter
ON_CPU_ALONE = ("granite", "olmo2")
ON_GPU = [family for family in FAMILIES if family not in ON_CPU_ALONE]
RULES = ("cosine", "predicted-damage", "price")


@cache
def model_of(family: str = "llama") -> PreTrainedModel:
    return pico_model(family, **SIZES, **CONFIGS.get(family, {})).to(DEVICE)


def profile_of(model: PreTrainedModel, rule: str, kind: Any = "low-rank", **overrides: Any) -> Profile:
    """Skips about half of the FFNs that it may, or leaves out about half of their parts."""
    if rule == "price":
        return price_profile(model, **{"cold_s": 0, "cold_e": LAYERS, **overrides})
    neurons = 6 if kind == "low-rank" and hasattr(model.model.layers[0].mlp, "gate_proj") else 0
    threshold = 1.0 if rule == "predicted-damage" else float(dense_similarities(model, TEXT)[:, :-1].quantile(0.5))
    settings = {"cold_s": 0, "cold_e": LAYERS, "warm_up": 0, "threshold": threshold, **overrides}
    shape = {"rank": 4, "neurons": neurons} if kind == "low-rank" else {}
    return make_compensated(kind, rule=rule, **shape, **model_info(model, id="org/pico").model_dump(), **settings)


@torch.inference_mode()
def expected(model: PreTrainedModel, profile: Profile | None) -> tuple[Tensor, SkipStats | None]:
    """Logits ``[NEW, batch, vocabulary]`` of the tokens behind the prompt, by the model itself, and what it skipped."""
    past = DynamicCache(config=model.config)
    position = (MASK.cumsum(1) - 1).clamp(min=0)
    logits = []
    with nullcontext() if profile is None else ffnskip.apply(model, profile) as applied:
        for begin, end in [(0, PROMPT), *((i, i + 1) for i in range(PROMPT, PROMPT + NEW))]:
            chunk = slice(begin, end)
            output = model(
                TEXT[:, chunk], attention_mask=MASK[:, :end], position_ids=position[:, chunk], past_key_values=past
            )
            logits.append(output.logits[:, -1].float())
        return torch.stack(logits[1:]), None if applied is None else applied.stats


def step_of(model: PreTrainedModel, profile: Profile | None, capacity: int = PROMPT + NEW) -> CudaStep:
    fused = fuse(model, by_input=leaves_out_parts(profile))
    skip = None if profile is None else fuse_profile(profile, fused.intermediate, DEVICE)
    return CudaStep(fused, KeyValueCache.allocate(fused, BATCH, capacity, model.dtype), skip)


@torch.inference_mode()
def read_prompt(model: PreTrainedModel, cache: KeyValueCache) -> None:
    past = DynamicCache()
    position = (MASK.cumsum(1) - 1).clamp(min=0)[:, :PROMPT]
    model(TEXT[:, :PROMPT], attention_mask=MASK[:, :PROMPT], position_ids=position, past_key_values=past)
    cache.fill(past, (MASK == 0).sum(1))


def run(step: CudaStep, model: PreTrainedModel, warm_up: int = 0) -> Tensor:
    """As `expected`, by the step."""
    read_prompt(model, step.cache)
    logits = []
    for index in range(NEW):
        past_warm_up = torch.full((BATCH,), index >= warm_up)
        logits.append(step(TEXT[:, PROMPT + index], RUNNING, past_warm_up, past_warm_up).clone())
    return torch.stack(logits)


def counts_of(step: CudaStep) -> SkipStats:
    """What it counted since they were looked at last."""
    step.drain_counts(stats := SkipStats(LAYERS))
    return stats


def does_as_the_runtime(model: PreTrainedModel, profile: Profile, warm_up: int = 0) -> SkipStats:
    """Asserts that a step gives the same logits with the same skips; what was skipped."""
    logits, stats = expected(model, profile)
    step = step_of(model, profile)
    near(run(step, model, warm_up), logits)
    assert stats is not None
    counts = replace(counts_of(step), tokens=stats.tokens, warm_up_tokens=stats.warm_up_tokens)
    for name, value in asdict(counts).items():
        assert value == pytest.approx(getattr(stats, name), rel=1e-12), name
    return stats


def near(logits: Tensor, wanted: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(logits, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("family", ON_GPU)
def test_without_a_profile_it_is_the_model(family: str) -> None:
    model = model_of(family)
    near(run(step_of(model, None), model), expected(model, None)[0])


@pytest.mark.parametrize("family", ON_CPU_ALONE)
def test_what_the_kernels_do_not_know_is_refused(family: str) -> None:
    with pytest.raises(UnsupportedModelError, match="no scaled residuals and no layers without norms"):
        step_of(model_of(family), None)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("family", ON_GPU)
def test_with_a_profile_it_skips_what_the_runtime_skips(family: str, rule: str) -> None:
    model = model_of(family)
    stats = does_as_the_runtime(model, profile_of(model, rule))
    assert 0.05 < stats.skip_ratio < 0.95
    assert (stats.attention_flops > 0) == (rule == "price")


@pytest.mark.parametrize("kind", ["none", "mean", "linear"])
def test_every_kind_of_compensation_stands_in_for_an_ffn(kind: str) -> None:
    model = model_of()
    does_as_the_runtime(model, profile_of(model, "predicted-damage", kind))


def test_a_warm_up_and_a_region_inside_the_model_run_dense() -> None:
    model = model_of()
    profile = profile_of(model, "cosine", "none", warm_up=1, cold_s=1, threshold=-1.0)
    stats = does_as_the_runtime(model, profile, warm_up=1)
    assert stats.skipped == [0, 0, BATCH * (NEW - 1)]


def test_a_trigger_skips_as_many_ffns_as_the_window_says() -> None:
    model = model_of()
    for window, skipped in ((1, [0, BATCH * NEW, 0]), (2, [0, BATCH * NEW, BATCH * NEW])):
        step = step_of(model, profile_of(model, "cosine", "none", window=window, threshold=-1.0))
        run(step, model)
        assert counts_of(step).skipped == skipped


def test_tokens_of_the_warm_up_and_layers_outside_of_the_region_leave_nothing_out() -> None:
    model = model_of()
    stats = does_as_the_runtime(model, profile_of(model, "price", warm_up=1, cold_s=1, cold_e=2), warm_up=1)
    assert stats.checked == [0, BATCH * (NEW - 1), 0]
    assert [left_out > 0 for left_out in stats.left_out] == [False, True, False]
    assert 0 < stats.least < 1 / LAYERS


@pytest.mark.parametrize("threshold", [0.0, 1e9])
def test_everything_and_nothing_can_be_left_out(threshold: float) -> None:
    model = model_of("qwen2")  # with biases, which are added whatever is left out
    stats = does_as_the_runtime(model, profile_of(model, "price", threshold=threshold))
    assert stats.skip_ratio == stats.least == pytest.approx(float(threshold > 0))
    assert (stats.never_skipped > 0) == (threshold == 0)


def test_a_counted_token_that_may_leave_nothing_out_is_the_worst_case() -> None:
    model = model_of()
    step = step_of(model, profile_of(model, "price"))
    read_prompt(model, step.cache)
    step(TEXT[:, PROMPT], RUNNING, ~RUNNING, torch.tensor([True, False]))
    counts = counts_of(step)
    assert (counts.least, counts.never_skipped, counts.checked) == (0.0, 1, [1] * LAYERS)


def test_a_row_that_has_ended_changes_nothing_for_the_others() -> None:
    model = model_of()
    profile = profile_of(model, "price")
    logits, counts = [], []
    for ended in (False, True):
        step = step_of(model, profile)
        read_prompt(model, step.cache)
        running = torch.tensor([True, False])
        logits.append(step(TEXT[:, PROMPT], torch.tensor([False, ended]), running, running)[0].clone())
        counts.append(counts_of(step))
    near(*logits)
    assert counts[0] == counts[1]


def test_int8_weights_are_read_input_by_input() -> None:
    model = pico_model(**SIZES).to(DEVICE)
    pack_weights(model, "int8")
    wanted = expected(model, None)[0]
    fused = fuse(model, by_input=True)
    near(run(CudaStep(fused, KeyValueCache.allocate(fused, BATCH, PROMPT + NEW, model.dtype), None), model), wanted)


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_packed_weights_are_read_as_they_are(format: Any) -> None:
    model = pico_model(**SIZES, intermediate_size=64).to(DEVICE)
    pack_weights(model, format)
    near(run(step_of(model, None), model), expected(model, None)[0])


def test_a_model_in_bfloat16_gives_what_it_gives_but_for_rounding() -> None:
    model = pico_model(dtype=torch.bfloat16, **SIZES).to(DEVICE)
    near(run(step_of(model, None), model), expected(model, None)[0], 0.1)


def test_a_step_takes_one_decode_after_the_other() -> None:
    model = model_of()
    step = step_of(model, profile_of(model, "cosine", "none"))
    first, counts = run(step, model), counts_of(step)
    assert torch.equal(run(step, model), first)
    assert counts_of(step) == counts


def test_a_full_cache_is_refused() -> None:
    model = model_of()
    step = step_of(model, None, capacity=PROMPT)
    read_prompt(model, step.cache)
    no = torch.zeros(BATCH, dtype=torch.bool)
    with pytest.raises(FfnskipError, match=r"^The key-value cache is full: it holds 10 tokens\.$"):
        step(TEXT[:, PROMPT], no, no, no)


def test_more_than_16_rows_are_refused() -> None:
    fused = fuse(model_of())
    cache = KeyValueCache.allocate(fused, 17, 4, torch.float32)
    with pytest.raises(FfnskipError, match=r"^The decode step on a GPU takes at most 16 sequences at once\.$"):
        CudaStep(fused, cache, None)


def test_triton_is_imported_only_where_a_step_is_built() -> None:
    program = """
import sys
sys.modules["triton"] = None  # as if it were not installed
import ffnskip, ffnskip.fast.cuda.cuda_step
try:
    ffnskip.fast.cuda.cuda_step.CudaStep(None, None, None)
except ffnskip.UnsupportedModelError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout == "The decode step on a GPU needs Triton: pip install triton.\n"


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@needs_gpu
@pytest.mark.parametrize("rule", RULES)
def test_a_replayed_graph_gives_what_its_kernels_give_alone(rule: str) -> None:
    model = model_of()
    profile = profile_of(model, rule)
    replayed, launched = step_of(model, profile), step_of(model, profile)
    launched._records = False
    assert torch.equal(run(replayed, model), run(launched, model))
    assert counts_of(replayed) == counts_of(launched)
    assert torch.equal(replayed.cache.keys, launched.cache.keys)
    assert int(replayed._pass.position) == replayed.cache.length == PROMPT + NEW


@needs_gpu
@pytest.mark.parametrize("rule", ["predicted-damage", "price"])
def test_a_replay_does_not_wait_for_the_device(rule: str) -> None:
    model = model_of()
    step = step_of(model, profile_of(model, rule))
    read_prompt(model, step.cache)
    yes = torch.ones(BATCH, dtype=torch.bool)
    step(TEXT[:, PROMPT], RUNNING, yes, yes)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(TEXT[:, PROMPT + 1], RUNNING, yes, yes)
    finally:
        torch.cuda.set_sync_debug_mode("default")
