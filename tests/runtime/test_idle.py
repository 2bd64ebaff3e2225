"""A profile that does nothing says so, and why."""

import copy
import gc
import subprocess
import sys
import warnings

import pytest
import torch
from support.pico import pico_model, pico_profile, pico_tokens
from transformers import PreTrainedModel

import ffnskip

TEXT = pico_tokens(9, batch=2)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return pico_model()


@torch.inference_mode()
def generate(model: PreTrainedModel, new: int) -> None:
    model.generate(TEXT, attention_mask=torch.ones_like(TEXT), max_new_tokens=new, do_sample=False, eos_token_id=None)


def idle(why: str) -> object:
    sentence = f"^The profile did nothing: no token was allowed to skip, as {why}[^.]*\\.$"
    return pytest.warns(ffnskip.FfnskipWarning, match=sentence)


def test_scoring_in_decode_mode(model: PreTrainedModel) -> None:
    with idle('all 18 were prompt, .* texts are scored with mode="score"'), ffnskip.apply(model, pico_profile(model)):
        model(TEXT)


def test_an_answer_within_the_warm_up(model: PreTrainedModel) -> None:
    with idle("each of 10 was within its sequence's warm-up of 7"):
        applied = ffnskip.apply(model, pico_profile(model, warm_up=7))
        generate(model, 6)
        applied.remove()


def test_a_model_that_was_not_run(model: PreTrainedModel) -> None:
    with idle("the model was not run"), ffnskip.apply(model, pico_profile(model)):
        pass


def test_nothing_is_said_twice_nor_where_tokens_could_skip_nor_beside_an_error(model: PreTrainedModel) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", ffnskip.FfnskipWarning)
        with ffnskip.apply(model, pico_profile(model, threshold=2.0)) as applied:
            generate(model, 6)
            applied.reset_stats()
        assert applied.stats.tokens == 0
        applied.remove()
        with pytest.raises(KeyboardInterrupt), ffnskip.apply(model, pico_profile(model)):
            raise KeyboardInterrupt
        ffnskip.Decoder(model, pico_profile(model), path="general")


PROGRAM = """
import sys
sys.path.insert(0, "tests")
from support.pico import pico_model, pico_profile, pico_tokens
import ffnskip
model = pico_model()
applied = ffnskip.apply(model, pico_profile(model))
model(pico_tokens(9))
"""


def test_a_program_that_ends_with_a_profile_on() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert done.stderr.count("FfnskipWarning: The profile did nothing: no token was allowed to skip") == 1


def test_a_copy_of_the_model_skips_as_the_original_does(model: PreTrainedModel) -> None:
    with ffnskip.apply(model, pico_profile(model, threshold=-1.0, warm_up=0), mode="score") as applied:
        skipping = model(TEXT).logits
        tokens = applied.stats.tokens
        twin = copy.deepcopy(model)
        assert torch.equal(twin(TEXT).logits, skipping)
        assert applied.stats.tokens == tokens
    assert not torch.equal(model(TEXT).logits, skipping)
    assert torch.equal(twin(TEXT).logits, skipping)
    del twin
    gc.collect()
