"""What is recorded, against similarities computed by hand; and the recording as a file: what is refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from support.factories import TEXT, make_profile
from support.pico import N_LAYERS, pico_model, pico_tokens
from torch import Tensor
from transformers import PreTrainedModel

from ffnskip import FfnskipError
from ffnskip.profiles.evidence import CalibrationText
from ffnskip_cli.calibration.recording.file import Identity, Source, Statistics, load_statistics, refuse_difference
from ffnskip_cli.calibration.recording.record import Record, record_generated, record_text

PROMPT, NEW = 6, 12


@torch.inference_mode()
def by_hand(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """cos(h, h + f) of one sequence ``[length]`` in a Llama model, ``[length, n_layers]``, by hooks of its own."""
    h: list[Tensor] = []
    f: list[Tensor] = []
    hooks = []
    body: Any = model.model
    for layer in body.layers:
        norm = layer.post_attention_layernorm
        hooks.append(norm.register_forward_pre_hook(lambda module, args: h.append(args[0][0].double())))
        hooks.append(layer.mlp.register_forward_hook(lambda module, args, output: f.append(output[0].double())))
    model(tokens[None])
    for hook in hooks:
        hook.remove()
    columns = [(a * (a + b)).sum(-1) / (a.norm(dim=-1) * (a + b).norm(dim=-1)) for a, b in zip(h, f, strict=True)]
    return torch.stack(columns, dim=-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_text_is_recorded_token_by_token_and_layer_by_layer(dtype: torch.dtype) -> None:
    model, tokens = pico_model(dtype=dtype), pico_tokens(20, batch=3)
    record = record_text(model, tokens)
    assert torch.equal(record.sequences, tokens)
    assert record.prompt_tokens == 0
    assert record.values.dtype == torch.float32
    expected = torch.stack([by_hand(model, sequence) for sequence in tokens])
    assert torch.allclose(record.values.double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "phi"])
def test_recording_while_generating_sees_what_one_pass_over_the_same_tokens_sees(name: str) -> None:
    model = pico_model(name)
    generated = record_generated(model, pico_tokens(PROMPT, batch=4), NEW)
    teacher_forced = record_text(model, generated.sequences)
    assert generated.values.shape == (4, NEW, N_LAYERS)
    assert generated.prompt_tokens == PROMPT
    assert torch.allclose(generated.values, teacher_forced.values[:, PROMPT:], rtol=0, atol=2e-6)
    assert not torch.allclose(generated.values, teacher_forced.values[:, PROMPT - 1 : -1], atol=1e-3)


def test_generated_sequences_are_the_prompts_and_their_greedy_continuations() -> None:
    model, prompts = pico_model(dtype=torch.float64), pico_tokens(PROMPT, batch=5)
    sequences = record_generated(model, prompts, NEW).sequences
    assert torch.equal(sequences[:, :PROMPT], prompts)
    with torch.inference_mode():
        greedy = model(sequences).logits.argmax(dim=-1)
    assert torch.equal(sequences[:, PROMPT:], greedy[:, PROMPT - 1 : -1])


def test_the_warm_up_is_left_out_of_each_sequence() -> None:
    similarities = torch.rand(70, 5, N_LAYERS)
    record = Record(torch.zeros(70, 8), similarities)
    past = torch.cat([sequence[3:] for sequence in similarities])
    assert torch.equal(torch.cat([chunk.flatten(0, 1) for chunk in record.chunks(3)]), past)
    assert torch.equal(torch.stack(list(record.layers(3)), dim=1), past)


def test_a_recorded_model_is_left_as_it_was() -> None:
    model, tokens = pico_model(), pico_tokens(4)
    record_text(model, tokens)
    record_generated(model, tokens, 2)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


SEQUENCES, LENGTH = 5, 8
DOCUMENTS = frozenset({b"\x00" * 32, b"\xff" * 32})


def identity(**changes: Any) -> Identity:
    sizes = {"tokens_used": SEQUENCES * LENGTH, "sequence_length": LENGTH}
    text = TEXT | sizes | {"text_sha256": "ab" * 32, "seed": 0, "dtype": "float32", "on": "text"}
    source = Source(make_profile().model, "ef" * 32, "float32")
    text |= {name: value for name, value in changes.items() if name in text}
    source = replace(source, **{name: value for name, value in changes.items() if hasattr(source, name)})
    return Identity(source, CalibrationText.model_validate(text), DOCUMENTS, changes.get("tokens_sha256", "aa" * 32))


def recording() -> Record:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 1000, (SEQUENCES, LENGTH), generator=generator)
    return Record(tokens, torch.rand(SEQUENCES, LENGTH, N_LAYERS, generator=generator))


def part(places: list[int], whole: Record, **changes: Any) -> Statistics:
    statistics = Statistics(identity(**changes))
    index = torch.tensor(places)
    statistics.put(index, Record(whole.sequences[index], whole.values[index]))
    return statistics


def save_each(folder: Path, *parts: Statistics) -> list[Path]:
    paths = [folder / f"{number}.safetensors" for number in range(len(parts))]
    for statistics, path in zip(parts, paths, strict=True):
        statistics.save(path)
    return paths


@pytest.mark.parametrize("parts", [[[0, 1, 2, 3, 4]], [[4, 0], [2], [1, 3]], [[1, 3], [4, 0], [2]]])
def test_parts_that_were_saved_are_in_any_order_the_whole_bit_for_bit(tmp_path: Path, parts: list[list[int]]) -> None:
    whole = recording()
    paths = save_each(tmp_path / "new", *(part(places, whole) for places in parts))
    loaded = load_statistics(paths)
    assert (loaded.identity, loaded.missing) == (identity(), 0)
    assert torch.equal(loaded.record.sequences.long(), whole.sequences)
    assert torch.equal(loaded.record.values, whole.values)
    assert sorted((tmp_path / "new").iterdir()) == paths


def test_a_part_knows_what_it_lacks_and_holds_no_more_than_it_has(tmp_path: Path) -> None:
    (some, none) = save_each(tmp_path, part([3], recording()), Statistics(identity()))
    assert load_statistics([some]).missing == SEQUENCES - 1
    assert load_statistics([some]).done.tolist() == [0, 0, 0, 1, 0]
    assert load_statistics([none]).missing == SEQUENCES
    assert some.stat().st_size - none.stat().st_size < 2 * LENGTH * (N_LAYERS + 1) * 4


def test_a_sequence_that_two_files_hold_is_refused(tmp_path: Path) -> None:
    paths = save_each(tmp_path, part([0, 1], recording()), part([1, 2], recording()))
    with pytest.raises(
        FfnskipError, match=r"^\S+1\.safetensors holds sequences that the other files hold, too: [^\n]+$"
    ):
        load_statistics(paths)


@pytest.mark.parametrize(
    ("change", "fact"),
    [
        ({"model": make_profile(hidden_size=64).model}, "model.hidden_size is 64 and not 32"),
        ({"model": make_profile(weights_sha256="00" * 32).model}, "model.weights_sha256 is 0000"),
        ({"tokenizer_sha256": "00" * 32}, "tokenizer_sha256 is 0000"),
        ({"dtype": "bfloat16"}, "dtype is bfloat16 and not float32"),
        ({"text_sha256": "00" * 32}, "text.text_sha256 is 0000"),
        ({"seed": 1}, "text.seed is 1 and not 0"),
        ({"tokens_sha256": "00" * 32}, "tokens_sha256 is 0000"),
    ],
)
def test_recordings_of_different_things_are_kept_apart(tmp_path: Path, change: dict[str, Any], fact: str) -> None:
    other = Statistics(identity(**change))
    other.done[2:] = 1
    paths = save_each(tmp_path, part([0, 1], recording()), other)
    with pytest.raises(FfnskipError, match=rf"^\S+1\.safetensors does not fit \S+0\.safetensors: {fact}[^\n]*\.$"):
        load_statistics(paths)


def test_a_recording_of_another_model_is_told_from_the_model_alone() -> None:
    refuse_difference(identity().source.facts(), identity(seed=5).source.facts(), "the model", "the file")
    other = identity(model=make_profile(weights_sha256="00" * 32).model).source.facts()
    with pytest.raises(FfnskipError, match=r"^the file does not fit the model: model.weights_sha256 is 0000"):
        refuse_difference(identity().source.facts(), other, "the model", "the file")


def other_contents(kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    facts = identity().facts()
    tensors = {
        "places": torch.tensor([0]),
        "sequences": torch.zeros(1, LENGTH, dtype=torch.int32),
        "similarities": torch.zeros(1, LENGTH, N_LAYERS),
        "documents": torch.zeros(1, 32, dtype=torch.uint8),
    }
    match kind:
        case "other tensors":
            del tensors["places"]
        case "other version":
            facts["schema"] = "ffnskip-stats/v9"
        case "shape":
            tensors["similarities"] = torch.zeros(1, LENGTH, N_LAYERS + 1)
        case "places":
            tensors["places"] = torch.tensor([SEQUENCES])
        case "text":
            facts["text"]["dataset"] = "/etc/passwd"
    return tensors, facts


@pytest.mark.parametrize(
    "kind", ["noise", "cut", "other tensors", "other version", "shape", "places", "text", "folder"]
)
def test_a_file_that_is_no_recording_is_one_sentence(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "own.safetensors"
    tensors, facts = other_contents(kind)
    contents = save(tensors, metadata={"ffnskip": json.dumps(facts)})
    if kind == "folder":
        path.mkdir()
    else:
        path.write_bytes({"noise": b"no safetensors", "cut": contents[:-5]}.get(kind, contents))
    with pytest.raises(FfnskipError, match=r"^\S+ is no statistics file of this version \([^\n]+\)\.$"):
        load_statistics([path])


def test_others_may_read_a_recording_as_they_may_any_file(tmp_path: Path) -> None:
    (tmp_path / "any").touch()
    (path,) = save_each(tmp_path, part([0], recording()))
    assert path.stat().st_mode == (tmp_path / "any").stat().st_mode


def test_a_recording_that_cannot_be_read_or_written_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(FfnskipError, match=r"^There is no statistics file \S+: record one with --stats-out\.$"):
        load_statistics([tmp_path / "none"])
    (tmp_path / "file").touch()
    with pytest.raises(FfnskipError, match=r"^The statistics cannot be written to [^\n]+\.$"):
        Statistics(identity()).save(tmp_path / "file" / "own.safetensors")
