"""Models and texts as files, for commands."""

import random
from pathlib import Path

import torch
from support.pico import pico_model
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL_BYTES = {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": None}


def bytes_as_tokens() -> PreTrainedTokenizerFast:
    """One token a byte, then <s> = 256 and </s> = 257; it puts neither into a text by itself."""
    vocabulary = {byte: index for index, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE({**vocabulary, "<s>": 256, "</s>": 257}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", model_max_length=64, padding_side="left"
    )


def pieces_as_tokens() -> PreTrainedTokenizerFast:
    """Letters, which begin a word as another token, and bytes for all else: as the tokenizers of Llama 2 and Gemma."""
    letters = "abcdefgh"
    names = ["<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *letters]
    vocabulary = {name: index for index, name in enumerate([*names, *(f"\u2581{letter}" for letter in letters)])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("\u2581", letter) for letter in letters], byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    space, strip = decoders.Replace("\u2581", " "), decoders.Strip(" ", 1, 0)
    tokenizer.decoder = decoders.Sequence([space, decoders.ByteFallback(), decoders.Fuse(), strip])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def save_plateau(folder: Path) -> Path:
    """An eight-layer Llama model and its tokenizer; its FFNs of layers 1 to 6 change little."""
    model = pico_model(vocab_size=258, max_position_embeddings=512, num_hidden_layers=8, **SPECIAL_BYTES)
    with torch.no_grad():
        for layer, scale in zip(model.model.layers, (1.0, 0.4, 0.4, 0.5, 0.6, 0.7, 0.8, 2.0), strict=True):
            layer.mlp.down_proj.weight *= scale
    model.save_pretrained(folder)
    bytes_as_tokens().save_pretrained(folder)
    return folder


def save_text(path: Path) -> Path:
    """64,000 bytes, in which one document in eight is held out."""
    draw = random.Random(0)
    path.write_text("\n\n".join("".join(draw.choices("abcdefgh ", k=1000)) for _ in range(64)))
    return path
