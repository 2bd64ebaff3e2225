"""Calibration looks where skipping does, in models whose FFNs are built otherwise than Llama's."""

import pytest
import torch
from support.model_check import profile_of
from support.model_types import VOCABULARY, tiny_model

from ffnskip.model.sites import ffn_sites, first_output
from ffnskip_cli.calibration.fit.gradients import take_gradients
from ffnskip_cli.calibration.fit.trial import Seen, observe
from ffnskip_cli.calibration.lab import Lab
from ffnskip_cli.calibration.recording.record import record_text

TEXT = torch.randint(3, VOCABULARY, (3, 10), generator=torch.Generator().manual_seed(0))
NAMES = ["opt", "gpt_oss", "granitemoehybrid", "nemotron_h", "llama4_text", "gemma3n_text", "qwen4_exp_text"]


@pytest.mark.parametrize("name", [*NAMES, "openai-gpt"])
def test_a_calibration_sees_every_ffn(name: str) -> None:
    model = tiny_model(name)
    layers, hidden = len(ffn_sites(model)), model.config.get_text_config().hidden_size
    assert record_text(model, TEXT).values.shape == (*TEXT.shape, layers)
    gradients = take_gradients(Lab(model), TEXT, 2, 0)
    assert gradients.fisher.shape == (layers, hidden, hidden)
    assert all(matrix.trace() > 0 for matrix in gradients.fisher)
    found: list[Seen] = []
    observe(Lab(model), profile_of(model, "predicted-damage", 1.0), TEXT, found.append, "looking")
    assert [seen.place for seen in found] == list(range(layers - 1))
    for seen, site in zip(found, ffn_sites(model)[1:], strict=True):
        assert seen.x.shape == seen.f.shape == (TEXT.numel(), hidden)
        if site.join == "chain":
            with torch.inference_mode():
                output = seen.x[None]
                for module in site.modules:
                    output = first_output(module(output))
            assert torch.allclose(output.view_as(seen.f), seen.f, rtol=1e-3, atol=1e-4)
