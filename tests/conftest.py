"""No test talks to the Hugging Face Hub; models and tokenizers are made in the process."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read by huggingface_hub when it is imported
os.environ.pop("FORCE_COLOR", None)  # read by rich: with it, output would be coloured although it is no terminal

from collections import Counter
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read by triton when transformers imports it

from support.cli import succeed
from support.on_disk import bytes_as_tokens, save_plateau, save_text
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ffnskip_cli.sources.demo import demo_model_file as fetch_demo_model

# The files that take longest, the longest first.
LONG = (
    "test_cuda_step",
    "test_demo",
    "test_cli_programs",
    "test_integrations",
    "test_cli_calibrate",
    "test_cli_eval_tasks",
    "test_cli_identity",
    "test_lm_eval",
    "test_triton_compiles",
    "test_wheel",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes longest, and go on with the files of most tests.

    A file is one worker's, and the other waits for it at the end. Left alone, xdist begins with the files of most
    tests, and files of a few long ones come last.
    """
    tests = Counter(item.path for item in items)
    order = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: (order.get(item.path.stem, len(LONG)), -tests[item.path], item.path))


@pytest.fixture(scope="session")
def byte_tokenizer() -> PreTrainedTokenizerFast:
    return bytes_as_tokens()


@pytest.fixture(scope="session")
def pico_folder(tmp_path_factory: pytest.TempPathFactory, byte_tokenizer: PreTrainedTokenizerFast) -> Path:
    """A folder with a two-layer Llama model in bfloat16 and its tokenizer; copy it before changing anything."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=258,
        bos_token_id=256,
        eos_token_id=257,
        max_position_embeddings=64,
    )
    folder = tmp_path_factory.mktemp("models") / "pico"
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    byte_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def plateau_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an eight-layer Llama model and its tokenizer; its FFNs of layers 1 to 6 change little."""
    return save_plateau(tmp_path_factory.mktemp("models") / "plateau")


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .txt file of 64,000 bytes, in which one document in eight is held out."""
    return save_text(tmp_path_factory.mktemp("text") / "log.txt")


@pytest.fixture(scope="session")
def plateau_profiles(plateau_folder: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with profiles of that model by the paper's rule, with a warm-up of 4.

    0.05.yaml is within the quality budget and 0.30.yaml over it.
    """
    folder = tmp_path_factory.mktemp("profiles")
    sizes = ("--tokens", 1024, "--eval-tokens", 512, "--sequence-length", 64, "--warm-up", 4, "--candidates", 0)
    options = ("--dataset", text_file, "--output", folder, "--rule", "cosine", "--compensate", "none", *sizes)
    succeed("calibrate", plateau_folder, "--target", "0.05,0.3", *options)
    return folder


@pytest.fixture(scope="session")
def demo_model_file() -> Path:
    return fetch_demo_model(offline=False)


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FFNSKIP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"
