"""Text sampled from the model itself, the corpus named `self`: what a model writes is what it will decode."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from ffnskip.decode import GeneralPath, generate_tokens
from ffnskip.errors import FfnskipError
from ffnskip.model.sites import input_device
from ffnskip.sampling import Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_ROWS = 16  # documents sampled side by side
_LENGTH = 512  # tokens at which a document that does not end is cut


def sample_documents(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seed: str) -> Iterator[str]:
    """Sample documents at temperature 1 from nothing but the start-of-text token, without end; `seed` is any text.

    Raises:
        FfnskipError: the tokenizer has no token to start from.
    """
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise FfnskipError("The tokenizer has no start-of-text token to sample text from: name another --dataset.")
    end = {tokenizer.eos_token_id} - {None, start}
    prompts = torch.full((_ROWS, 1), start, device=input_device(model))
    for batch in itertools.count():
        sampling = Sampling(temperature=1.0, seed=random.Random(f"{seed} {batch}").getrandbits(62))
        steps = list(
            generate_tokens(GeneralPath(model), prompts, max_new_tokens=_LENGTH, sampling=sampling, stop_tokens=end)
        )
        rows = torch.stack(steps, dim=1)
        yield from tokenizer.batch_decode(rows, skip_special_tokens=True)
