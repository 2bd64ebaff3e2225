import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from support.factories import make_profile
from support.gguf_files import write_gguf
from support.pico import pico_model
from support.sentences import OUT_OF_MEMORY, sentence
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM, LlamaModel, T5Config, T5ForConditionalGeneration

from ffnskip.files import sha256_file
from ffnskip_cli.sources import demo
from ffnskip_cli.sources.devices import pick_device
from ffnskip_cli.sources.locate import locate_here
from ffnskip_cli.sources.models import load_model
from ffnskip_cli.sources.names import public_name

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def pico_copy(pico_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pico_folder, tmp_path / "copy"))


@pytest.mark.parametrize(
    "name", ["plain.txt", ".hidden.txt", "a:b.txt", "..", "~x", "back\\slash", "x" * 300, "li\nne"]
)
def test_every_local_name_becomes_one_that_a_profile_accepts(name: str) -> None:
    public = public_name(Path("/some/where") / name)
    assert make_profile(id=public).model.id
    assert (public == name) == (name == "plain.txt")


def test_local_folder(pico_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_model(str(pico_folder))
    assert (loaded.id, loaded.revision, loaded.gguf_sha256) == ("pico", None, None)
    assert loaded.model.config._name_or_path == "pico"
    assert loaded.model.dtype == torch.bfloat16
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert loaded.tokenizer.decode(loaded.tokenizer("häh")["input_ids"]) == "häh"
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        assert load_model(str(pico_folder), dtype=name, device="cpu").model.dtype == dtype
    monkeypatch.chdir(pico_folder)
    assert load_model(".").id == "pico"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": "int4"}, "use one of auto, float32"),
        ({"device": "toaster"}, "'toaster' cannot be used"),
        ({"device": "meta"}, "'meta' cannot be used"),
        ({"device": "cuda:99"}, "'cuda:99' cannot be used"),
        ({"device_map": "spread"}, "use one of auto, balanced, sequential"),
        ({"device_map": "auto", "device": "cpu"}, "leave --device cpu out"),
        ({"revision": "main"}, "goes only with a Hub id"),
    ],
)
def test_wrong_options(pico_folder: Path, options: dict[str, str], words: str) -> None:
    assert words in sentence(lambda: load_model(str(pico_folder), **options))


@pytest.mark.parametrize("name", ["auto", "cuda"])
@pytest.mark.parametrize(
    ("rank", "n_devices", "device"),
    [(None, 2, "cuda"), ("0", 2, "cuda:0"), ("1", 2, "cuda:1"), ("5", 4, "cuda:1"), ("1", 1, "cuda"), ("x", 2, "cuda")],
)
def test_each_process_of_torchrun_takes_its_own_cuda_device(
    monkeypatch: pytest.MonkeyPatch, name: str, rank: str | None, n_devices: int, device: str
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: n_devices)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    assert pick_device(name) == torch.device(device)
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("cuda:0") == torch.device("cuda:0")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert pick_device("auto") == torch.device("cpu")


@pytest.mark.parametrize("failure", OUT_OF_MEMORY)
def test_a_model_too_large_for_memory(pico_folder: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise failure

    monkeypatch.setattr("ffnskip_cli.sources.weights.AutoModelForCausalLM.from_pretrained", fail)
    message = sentence(lambda: load_model(str(pico_folder)))
    assert message.endswith("pico does not fit into memory: try --dtype bfloat16, --device-map auto or --device cpu")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no/such/folder", "no such file or folder"),
        ("./folder", "no such file or folder"),
        ("model.gguf", "no such file or folder"),
        ("x" * 5000 + ".gguf", "no such file or folder"),
        ("", "neither a file or folder"),
        ("two words/model", "neither a file or folder"),
        ("org/name@v1", "two revisions"),
        ("demo@v1", "leave @v1 out"),
        (__file__, "neither a folder nor a .gguf file"),
    ],
)
def test_wrong_names(name: str, words: str) -> None:
    options = {"revision": "v2"} if "@v1" in name and name != "demo@v1" else {}
    assert words in sentence(lambda: load_model(name, **options))


def test_names_of_the_hub_that_are_not_cached_while_offline() -> None:
    message = sentence(lambda: load_model("org/never-fetched"))
    assert "org/never-fetched is not in the local Hugging Face cache" in message
    assert "`demo`" in message
    assert sentence(lambda: load_model("nomodel")) == (
        "nomodel is neither a local folder, a .gguf file, `demo` nor a Hub id like org/name, and no model of the Hub "
        "with so short an id is in the local cache: check the spelling, or run once with a network"
    )


def test_what_lies_here_is_found_without_asking(pico_folder: Path) -> None:
    assert locate_here(str(pico_folder)) == pico_folder
    for name, revision in ((str(pico_folder), "v1"), ("demo", "v1"), ("org/never-fetched", None), ("model.gguf", None)):
        assert locate_here(name, revision) is None


def test_unreachable_hub_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: object, **kwargs: object) -> None:
        raise TimeoutError("timed out")

    monkeypatch.setattr("huggingface_hub.is_offline_mode", lambda: False)
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", unreachable)
    assert "(timed out): pass --offline" in sentence(lambda: load_model("org/never-fetched"))
    message = sentence(lambda: load_model("nomodel"))
    assert message.startswith("nomodel is neither ")
    assert "(timed out): check the spelling, or pass --offline" in message


@pytest.mark.parametrize("name", ["org/pico", "org/pico@main", f"org/pico@{COMMIT}"])
def test_a_cached_model_knows_its_commit(
    pico_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    repository = tmp_path / "models--org--pico"
    shutil.copytree(pico_folder, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    loaded = load_model(name, offline=True)
    assert (loaded.id, loaded.revision) == ("org/pico", COMMIT)
    assert loaded.model.config._name_or_path == "org/pico"


def test_pickled_weights_are_not_read(pico_copy: Path) -> None:
    torch.save(load_model(str(pico_copy)).model.state_dict(), pico_copy / "pytorch_model.bin")
    (pico_copy / "model.safetensors").rename(pico_copy / "other.safetensors")
    assert "model.safetensors" in sentence(lambda: load_model(str(pico_copy)))
    (pico_copy / "other.safetensors").unlink()
    assert "has no safetensors weights" in sentence(lambda: load_model(str(pico_copy)))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("config.json", None, "has no config.json"),
        *[
            ("config.json", config, "cannot be loaded")
            for config in ("{nope", "[]", "{}", '{"model_type": "nope"}', '{"model_type": "llama", "hidden_size": "x"}')
        ],
        ("config.json", ('"num_hidden_layers": 2', '"num_hidden_layers": 3'), "do not fill the model"),
        ("config.json", ('"intermediate_size": 64', '"intermediate_size": 48'), "do not fill the model"),
        ("tokenizer.json", None, "has no tokenizer"),
        ("tokenizer.json", "{nope", "the tokenizer of"),
        ("model.safetensors", None, "has no safetensors weights"),
        ("model.safetensors", "{nope", "cannot be loaded"),
        ("model.safetensors", -100, "cannot be loaded"),
    ],
)
def test_broken_folders(pico_copy: Path, name: str, content: str | tuple[str, str] | int | None, words: str) -> None:
    path = pico_copy / name
    match content:
        case None:
            path.unlink()
        case str():
            path.write_text(content)
        case int():
            path.write_bytes(path.read_bytes()[:content])
        case before, after:
            assert before in path.read_text()
            path.write_text(path.read_text().replace(before, after))
    assert words in sentence(lambda: load_model(str(pico_copy)))


def test_models_that_are_not_causal_or_lack_their_head(pico_copy: Path) -> None:
    LlamaModel.from_pretrained(pico_copy).save_pretrained(pico_copy)
    assert "first lm_head.weight" in sentence(lambda: load_model(str(pico_copy)))
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1}
    BertForMaskedLM(BertConfig(**sizes, vocab_size=258)).save_pretrained(pico_copy)
    assert "no causal language model (its model type is bert)" in sentence(lambda: load_model(str(pico_copy)))
    T5ForConditionalGeneration(T5Config(d_model=32, d_ff=64, num_layers=1, num_heads=2)).save_pretrained(pico_copy)
    assert "no causal language model (its model type is t5)" in sentence(lambda: load_model(str(pico_copy)))


def test_remote_code_is_named_and_not_run(pico_copy: Path) -> None:
    (pico_copy / "config.json").write_text('{"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}')
    (pico_copy / "own.py").write_text("raise SystemExit('remote code ran')")
    assert "--trust-remote-code" in sentence(lambda: load_model(str(pico_copy)))


def test_gguf_becomes_a_plain_model_once(
    pico_folder: Path, tmp_path: Path, own_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    original = load_model(str(pico_folder))
    file = tmp_path / "pico.Q8_0.gguf"
    kinds = {True: Kind.Q8_0, False: Kind.F32}
    write_gguf(file, original.model, lambda name: kinds["ffn" in name], original.tokenizer)
    loaded = load_model(str(file))
    assert "pico.Q8_0.gguf" in capsys.readouterr().err  # as it takes a while
    assert (loaded.id, loaded.gguf_sha256) == ("pico.Q8_0.gguf", sha256_file(file))
    assert loaded.model.dtype == torch.bfloat16
    for layer, expected in zip(loaded.model.model.layers, original.model.model.layers, strict=True):
        assert type(layer.mlp.up_proj) is torch.nn.Linear
        torch.testing.assert_close(layer.mlp.up_proj.weight, expected.mlp.up_proj.weight, atol=1e-3, rtol=1e-2)
    assert loaded.tokenizer("a")["input_ids"] == original.tokenizer("a")["input_ids"]

    (folder,) = (own_cache / "gguf").iterdir()
    made = (folder / "model.safetensors").stat().st_mtime_ns
    again = load_model(str(file))
    assert capsys.readouterr().err == ""
    assert (folder / "model.safetensors").stat().st_mtime_ns == made
    assert all(map(torch.equal, again.model.parameters(), loaded.model.parameters()))


@pytest.mark.parametrize("as_it_is", [True, False])
def test_gemma_3_in_gguf_rotates_slowly_where_it_sees_the_whole_text(
    as_it_is: bool, pico_folder: Path, tmp_path: Path, own_cache: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(pico_folder)
    rotation = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    original = pico_model("gemma3_text", vocab_size=len(tokenizer), intermediate_size=32, rope_parameters=rotation)
    file = write_gguf(tmp_path / "pico.gguf", original, lambda name: Kind.Q8_0, tokenizer)
    model = load_model(str(file), device="cpu", gguf_as_is=as_it_is).model
    assert model.config.rope_parameters == rotation
    for name, expected in original.model.rotary_emb.named_buffers():
        torch.testing.assert_close(model.model.rotary_emb.get_buffer(name), expected)


def test_broken_gguf_leaves_nothing_in_the_cache(tmp_path: Path, own_cache: Path) -> None:
    file = tmp_path / "broken.gguf"
    file.write_bytes(b"GGUF but no more")
    assert "broken.gguf cannot be loaded" in sentence(lambda: load_model(str(file)))
    assert not any((own_cache / "gguf").iterdir())


@pytest.mark.demo
def test_demo_model(demo_model_file: Path) -> None:
    assert sha256_file(demo_model_file) == demo.DEMO_MODEL_SHA256
    loaded = load_model("demo", offline=True)
    assert loaded.folder is not None
    assert locate_here("demo") == loaded.folder.path
    assert loaded.id == loaded.model.config._name_or_path == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert (loaded.revision, loaded.gguf_sha256) == (None, demo.DEMO_MODEL_SHA256)
    assert (loaded.model.config.num_hidden_layers, loaded.model.config.hidden_size) == (30, 576)
    prompt = loaded.tokenizer("The capital of France is", return_tensors="pt")
    assert "Paris" in loaded.tokenizer.decode(loaded.model(**prompt).logits[0, -1].argmax())
