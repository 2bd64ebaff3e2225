"""On what device, and in what precision, a model is loaded."""

import os

import torch

from ffnskip.errors import FfnskipError, out_of_memory

_DTYPES: dict[str, torch.dtype | str] = {
    "auto": "auto",
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_DEVICE_MAPS = ("auto", "balanced", "sequential")


def parse_dtype(name: str) -> torch.dtype | str:
    """The dtype of that name, or `auto`, as stored."""
    if name not in _DTYPES:
        raise FfnskipError(f"unknown dtype {name!r}: use one of {', '.join(_DTYPES)}")
    return _DTYPES[name]


def parse_device(name: str) -> torch.device:
    """The device that `name` stands for, if it can be used here."""
    try:
        device = pick_device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:  # an assertion is how torch says that it was built without CUDA
        if out_of_memory(error):
            raise
        raise FfnskipError(f"device {name!r} cannot be used here: try auto") from error
    return device


def pick_device(name: str) -> torch.device:
    """The device that `name` stands for; `auto` is cuda if there is one, or else cpu.

    Of several CUDA devices, each process that torchrun starts on a machine takes its own.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    rank = os.environ.get("LOCAL_RANK", "")
    if name == "cuda" and rank.isdecimal() and torch.cuda.device_count() > 1:
        return torch.device("cuda", int(rank) % torch.cuda.device_count())
    return torch.device(name)


def check_device_map(device_map: str | None, device: str) -> None:
    """Refuse a device map that accelerate has not, or that is named beside a device."""
    if device_map is None:
        return
    if device_map not in _DEVICE_MAPS:
        raise FfnskipError(f"unknown device map {device_map!r}: use one of {', '.join(_DEVICE_MAPS)}")
    if device != "auto":
        raise FfnskipError(f"--device-map {device_map} chooses the devices itself: leave --device {device} out")
