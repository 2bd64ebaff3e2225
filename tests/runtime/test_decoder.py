"""The fused path against the general one, which is Hugging Face's own forward pass: same tokens, same decisions."""

import pytest
import torch
from support.compiler import COMPILES, needs_compiler
from support.factories import KINDS, Kind, make_compensated, make_profile
from support.pico import middle_threshold, pico_model, pico_profile, pico_tokens
from torch import Tensor
from transformers import PreTrainedModel

import ffnskip
from ffnskip import Decoder, FfnskipError, Profile, ProfileError, Sampling, UnsupportedModelError
from ffnskip.decode import GeneralPath, generate_tokens
from ffnskip.fast import build
from ffnskip.fast.families import FAMILIES

PROMPTS = pico_tokens(10, batch=3)
PADDED = torch.ones_like(PROMPTS)
PADDED[1, :4] = 0
NEW = 30


def both(model: PreTrainedModel, profile: Profile | None = None) -> tuple[Decoder, Decoder]:
    return Decoder(model, profile, path="fused"), Decoder(model, profile, path="general")


def tokens(decoder: Decoder, prompts: Tensor = PROMPTS, new: int = NEW, **options: object) -> list[list[int]]:
    return [step.tolist() for step in decoder.decode(prompts, max_new_tokens=new, **options)]  # type: ignore[arg-type]


def decide_alike(model: PreTrainedModel, profile: Profile, **options: object) -> ffnskip.SkipStats:
    """Asserts that both paths give the same tokens with the same skips; what they skipped."""
    fused, general = both(model, profile)
    assert tokens(fused, **options) == tokens(general, **options)  # type: ignore[arg-type]
    assert fused.stats == general.stats
    assert 0.05 < fused.stats.skip_ratio < 0.95
    return fused.stats


@needs_compiler
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_gives_the_tokens_of_the_general_path_densely_and_by_either_rule(name: str) -> None:
    model = pico_model(name)
    fused, general = both(model)
    assert tokens(fused, attention_mask=PADDED) == tokens(general, attention_mask=PADDED)
    assert tokens(fused, PROMPTS[:1], 100) == tokens(general, PROMPTS[:1], 100)  # beyond every window
    threshold = middle_threshold(model, PROMPTS)
    for window in (None, 1):
        profile = pico_profile(model, threshold=threshold, window=window)
        decide_alike(model, profile, attention_mask=PADDED, stop_tokens=range(3, 20))
    info = pico_profile(model).model.model_dump()
    neurons = 0 if name == "phi3" else 8  # whose gate and up projection are one matrix, so neurons are not told apart
    settings = {"rule": "predicted-damage", "threshold": 1.0, "rank": 3, "neurons": neurons}
    decide_alike(model, make_compensated("low-rank", **settings, **info), attention_mask=PADDED)


@needs_compiler
@pytest.mark.parametrize("rule", ["cosine", "predicted-damage"])
@pytest.mark.parametrize(
    ("kind", "rank", "neurons"),
    [*KINDS, ("low-rank", 40, 8), ("low-rank", 3, 48)],  # a rank above the hidden size; all neurons
)
def test_every_compensation_adds_alike(rule: str, kind: Kind, rank: int | None, neurons: int) -> None:
    model = pico_model("qwen2")
    info = pico_profile(model).model.model_dump()
    threshold = 1.0 if rule == "predicted-damage" else middle_threshold(model, PROMPTS)
    profile = make_compensated(kind, rule=rule, rank=rank, neurons=neurons, threshold=threshold, **info)
    decide_alike(model, profile, attention_mask=PADDED)


@needs_compiler
def test_a_refresh_runs_dense_in_between() -> None:
    model = pico_model()
    assert decide_alike(model, pico_profile(model, threshold=-1.0, refresh_every=3)).never_skipped > 0


@needs_compiler
@pytest.mark.parametrize("batch", [1, 2, 5, 16])
def test_a_row_of_a_batch_decides_as_it_would_alone(batch: int) -> None:
    model = pico_model()
    prompts = pico_tokens(8, batch)
    decoder = Decoder(model, pico_profile(model, threshold=middle_threshold(model, prompts)), path="fused")
    together = tokens(decoder, prompts)
    stats = decoder.stats
    decoder.reset_stats()
    alone = [tokens(decoder, prompt[None]) for prompt in prompts]
    assert together == [[row[step][0] for row in alone] for step in range(NEW)]
    assert decoder.stats == stats


@needs_compiler
def test_statistics_are_counted_while_tokens_come_and_over_decodes_of_any_size() -> None:
    model = pico_model()
    decoder = Decoder(model, pico_profile(model, threshold=-1.0), path="fused")
    counts = [(decoder.stats.warm_up_tokens, decoder.stats.tokens) for _ in decoder.decode(PROMPTS, max_new_tokens=5)]
    assert counts == [(0, 0), (3, 0), (6, 0), (6, 3), (6, 6)]
    tokens(decoder, PROMPTS[:1], 4)
    assert (decoder.stats.warm_up_tokens, decoder.stats.tokens) == (8, 7)
    assert decoder.stats.skipped == [0, 0, 7, 7, 7, 0]
    decoder.reset_stats()
    assert decoder.stats == ffnskip.SkipStats(6)


@needs_compiler
def test_bfloat16_is_nearer_to_float32_than_the_models_own_loop() -> None:
    wide, narrow = pico_model(), pico_model(dtype=torch.bfloat16)
    wide.load_state_dict(narrow.state_dict())  # the very weights
    expected = tokens(Decoder(wide, path="general"))
    agreed = [torch.tensor(tokens(decoder)) == torch.tensor(expected) for decoder in both(narrow)]
    fused, general = (float(steps.float().mean()) for steps in agreed)
    assert fused >= general
    assert fused > 0.5


@needs_compiler
@pytest.mark.parametrize("format", ["int8", "int4"])
@pytest.mark.parametrize("tied", [True, False])
def test_packed_weights_are_read_as_they_unpack(format: str, tied: bool) -> None:
    sizes = (32, 64) if tied else (288, 608)  # one group of int4; odd numbers of them, in more than one stretch
    model = pico_model(hidden_size=sizes[0], intermediate_size=sizes[1], tie_word_embeddings=tied)
    ffnskip.pack_weights(model, format)  # type: ignore[arg-type]
    decide_alike(model, pico_profile(model, threshold=middle_threshold(model, PROMPTS)))


@needs_compiler
def test_sampling_stopping_and_decoding_again_are_alike() -> None:
    sampling = Sampling(temperature=0.8, top_p=0.9, seed=3)
    fused, general = both(pico_model())
    once = tokens(fused)
    assert tokens(fused, new=5) == once[:5]
    assert tokens(fused) == once == tokens(general)
    assert tokens(fused, sampling=sampling) == tokens(general, sampling=sampling) != once
    stop = {once[4][0], once[9][1], once[7][2]}  # one of each row
    stopped = tokens(fused, stop_tokens=stop)
    assert stopped == tokens(general, stop_tokens=stop)
    assert len(stopped) < NEW


@needs_compiler
@pytest.mark.parametrize(
    ("prompts", "why"),
    [(pico_tokens(4, batch=17), "at most 16 sequences at once"), (pico_tokens(110), "at most 128 positions")],
)
def test_what_the_fused_path_does_not_take_goes_the_general_way_and_says_why(prompts: Tensor, why: str) -> None:
    model, new = pico_model(), 19
    profile = pico_profile(model, threshold=-1.0)
    free, general = Decoder(model, profile), Decoder(model, profile, path="general")
    assert tokens(free, prompts, new) == tokens(general, prompts, new)
    assert free.stats == general.stats
    assert free.path == "general"
    assert why in str(free.why_general)
    with pytest.raises(UnsupportedModelError, match=why):
        tokens(Decoder(model, profile, path="fused"), prompts, new)
    tokens(free)
    assert (free.path, free.why_general) == ("fused", None)


@pytest.mark.parametrize("name", ["gpt2", "mixtral"])
def test_other_models_decode_by_the_general_path_and_say_why(name: str) -> None:
    model = pico_model(name)
    decoder = Decoder(model)
    why = f"Models of type {name!r} have no fused decode step."
    assert (decoder.path, decoder.why_general) == ("general", why)
    steps = generate_tokens(GeneralPath(model), PROMPTS, max_new_tokens=NEW)
    assert tokens(decoder) == [step.tolist() for step in steps]
    assert decoder.seconds() is None
    with pytest.raises(UnsupportedModelError, match="have no fused decode step"):
        Decoder(model, path="fused")


def test_without_a_compiler_the_general_path_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    build._load.cache_clear()
    try:
        decoder = Decoder(pico_model())
    finally:
        build._load.cache_clear()
    assert decoder.path == "general"
    assert "install one" in str(decoder.why_general)


@needs_compiler
def test_a_model_that_was_read_wrongly_is_not_decoded_by_the_fused_path() -> None:
    model = pico_model()
    model.model.layers[2].self_attn.scaling *= 10  # which is read from the first layer
    decoder = Decoder(model)
    assert decoder.path == "general"
    assert "gives other logits than the model" in str(decoder.why_general)


def test_a_decoder_refuses_what_apply_refuses() -> None:
    model = pico_model()
    with pytest.raises(ProfileError):
        Decoder(model, make_profile())  # of another model
    with pytest.raises(FfnskipError, match="must be one of fused, general"):
        Decoder(model, path="quick")  # type: ignore[arg-type]
    decoder = Decoder(model)
    for decode in (lambda: Decoder(model), lambda: decoder.decode(PROMPTS, max_new_tokens=3))[: 1 + COMPILES]:
        with ffnskip.apply(model, pico_profile(model)), pytest.raises(FfnskipError, match="already has a profile on"):
            decode()


@needs_compiler
def test_only_the_latest_decode_goes_on() -> None:
    model = pico_model()
    decoder = Decoder(model, path="fused")
    first = decoder.decode(PROMPTS[:1], max_new_tokens=9)
    next(first)
    second = decoder.decode(PROMPTS, max_new_tokens=9)
    next(second)
    with pytest.raises(FfnskipError, match="Another decode was started with this decoder"):
        next(first)
    assert len(list(second)) == 8


@needs_compiler
def test_the_default_dtype_does_not_matter() -> None:
    expected = tokens(Decoder(pico_model(), path="fused"))
    model = pico_model()
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert tokens(Decoder(model, path="fused")) == expected
    finally:
        torch.set_default_dtype(torch.float32)


@needs_compiler
@pytest.mark.parametrize("tied", [True, False])
def test_packed_weights_of_a_float16_model(tied: bool) -> None:
    model = pico_model(dtype=torch.float16, tie_word_embeddings=tied)
    ffnskip.pack_weights(model, "int8")
    decoder = Decoder(model)
    assert decoder.path == ("fused" if tied else "general")  # the embedding of the other is in float16 still
    assert len(tokens(decoder, new=4)) == 4


@needs_compiler
def test_what_is_not_a_number_stays_so() -> None:
    model = pico_model()
    ffnskip.pack_weights(model, "int8")
    decoder = Decoder(model, path="fused")
    with torch.no_grad():
        model.model.layers[2].input_layernorm.weight.fill_(float("nan"))
    engine = Decoder(model, check=False, path="fused")._fused
    path = engine.path(1)
    path.prefill(PROMPTS[:1], None)
    assert path.step(PROMPTS[:1, 0], torch.tensor([False])).isnan().all()
    assert decoder.path == "fused"


@needs_compiler
def test_time_only_grows() -> None:
    decoder = Decoder(pico_model(max_position_embeddings=2048), path="fused")
    spent = []
    for prompts, new in ((PROMPTS[:1], 20), (PROMPTS, 20), (PROMPTS, 700), (PROMPTS[:1], 5)):
        tokens(decoder, prompts, new)
        spent.append(decoder.seconds()["ffn"])
    assert spent == sorted(spent)
    assert spent[0] > 0
