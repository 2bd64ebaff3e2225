"""What `model.generate` writes, greedily unless told otherwise, and a profile that skips some of it."""

from typing import Any

import torch
from support.pico import pico_profile
from torch import Tensor
from transformers import PreTrainedModel

from ffnskip import Profile


def cosine(model: PreTrainedModel) -> Profile:
    return pico_profile(model, threshold=0.9, warm_up=3)


def generate(model: PreTrainedModel, prompts: Tensor, **settings: Any) -> list[list[int]]:
    torch.manual_seed(0)
    settings = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "pad_token_id": 0} | settings
    output = model.generate(prompts, **settings)
    return (output if isinstance(output, Tensor) else output.sequences).tolist()
