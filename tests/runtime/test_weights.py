"""The file in which the weights of probes and compensation lie, beside the profile that names it by its hash."""

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save
from support.factories import each_combination, full, make_compensated, make_profile, tensors_of
from torch import Tensor

from ffnskip.compensation.kinds import BIAS, FIRST, LINEAR, NEURONS, SECOND
from ffnskip.errors import ProfileError
from ffnskip.profiles.evidence import CurvePoint
from ffnskip.profiles.profile import Profile, dump_profile, load_profile, parse_profile, save_profile
from ffnskip.profiles.weights import Weights
from ffnskip.rules.predicted_damage import PROBE, PROBE_BIAS

Tensors = dict[str, Tensor]


def save_with(path: Path, data: bytes, like: Profile) -> None:
    """A profile that names these bytes, whatever they are, as its weights."""
    named = {"file": "w.safetensors", "sha256": hashlib.sha256(data).hexdigest()}
    compensation = like.compensation.model_copy(update=named)
    path.write_text(dump_profile(like.model_copy(update={"compensation": compensation})))
    path.with_name("w.safetensors").write_bytes(data)


@each_combination
def test_a_profile_and_its_weights_survive_a_file(profile: Profile, tmp_path: Path) -> None:
    save_profile(profile, tmp_path / "p.yaml")
    loaded = load_profile(tmp_path / "p.yaml")
    assert loaded == profile
    assert loaded.weights == profile.weights
    file = profile.compensation.file
    assert sorted(os.listdir(tmp_path)) == ["p.yaml", file]
    stored = load_file(tmp_path / file)
    assert stored.keys() == profile.weight_shapes.keys()
    assert all(torch.equal(stored[name], tensor) for name, tensor in tensors_of(profile).items())


@each_combination
def test_the_yaml_alone_is_read_but_is_not_the_profile_and_cannot_be_saved(profile: Profile, tmp_path: Path) -> None:
    parsed = parse_profile(dump_profile(profile))
    assert parsed.weights is None
    assert dump_profile(parsed) == dump_profile(profile)
    assert parsed != profile
    with pytest.raises(ProfileError, match=r"without its weights: read it from its file"):
        save_profile(parsed, tmp_path / "p.yaml")
    assert not os.listdir(tmp_path)


def test_equal_weights_make_the_same_file_and_other_weights_another() -> None:
    one, same = full(), full()
    tensors = tensors_of(one)
    other = one.with_weights(Weights(tensors | {BIAS: tensors[BIAS] + 1}))
    assert one == same
    assert hash(one.weights) == hash(same.weights)
    assert dump_profile(one) == dump_profile(same)
    assert one.weights not in (other.weights, "weights")
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.weights.tensors = {}  # type: ignore[misc,union-attr]
    assert one.compensation.file != other.compensation.file
    assert one.with_weights(Weights(dict(reversed(tensors.items())))) == one
    transposed = {name: t.mT.contiguous().mT if t.dim() > 1 else t for name, t in tensors.items()}
    assert not transposed[FIRST].is_contiguous()
    assert Weights(transposed).sha256 == one.compensation.sha256


def test_four_profiles_share_one_file_beside_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    profile = full()
    for number in range(4):
        save_profile(profile.with_threshold(0.01 * number), tmp_path / f"{number}.yaml")
    assert sorted(os.listdir(tmp_path)) == ["0.yaml", "1.yaml", "2.yaml", "3.yaml", profile.compensation.file]
    for number in range(4):
        assert load_profile(tmp_path / f"{number}.yaml") == profile.with_threshold(0.01 * number)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert load_profile("../0.yaml") == profile.with_threshold(0.0)
    weights = tmp_path / str(profile.compensation.file)
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(ProfileError, match=r"safetensors: not the file that the profile was made with"):
        load_profile("../0.yaml")


def test_a_file_of_another_name_and_make_keeps_its_bytes(tmp_path: Path) -> None:
    profile = full()
    data = save(tensors_of(profile), {"note": "made elsewhere"})
    save_with(tmp_path / "p.yaml", data, profile)
    save_profile(load_profile(tmp_path / "p.yaml"), tmp_path / "other" / "q.yaml")
    loaded = load_profile(tmp_path / "other" / "q.yaml")
    assert loaded.weights.data == data
    assert all(torch.equal(loaded.weights.tensors[name], tensor) for name, tensor in tensors_of(profile).items())


def test_moving_a_profile_keeps_its_weights() -> None:
    profile = full().model_copy(update={"curve": (CurvePoint(0.01, 0.1, 0.0), CurvePoint(0.03, 0.3, 0.2))})
    for moved in (profile.moved(threshold=0.02), profile.with_threshold(0.02), profile.at_ratio(0.2)):
        assert moved.skip.threshold == pytest.approx(0.02)
        assert moved.weights is profile.weights
    assert profile.moved(threshold=0.02) != profile
    assert profile.moved(threshold=0.02).moved(threshold=profile.skip.threshold) == profile


WRONG: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "missing": (lambda t: {name: t[name] for name in t if name != PROBE_BIAS}, "probe.bias: is missing"),
    "unknown": (lambda t: t | {LINEAR: torch.zeros(4, 32, 32)}, "linear: this rule with this kind has no such tensor"),
    "long-name": (lambda t: t | {"a" * 9999: torch.zeros(1)}, f"{'a' * 119}…: this rule with this kind has no such"),
    "odd-name": (lambda t: t | {"\x1b[2J\n": torch.zeros(1)}, "?[2J?: this rule with this kind has no such tensor"),
    "shape": (lambda t: t | {BIAS: torch.zeros(4, 31)}, "bias: must have the shape (4, 32), not (4, 31)"),
    "layers": (lambda t: t | {PROBE: torch.zeros(3, 32)}, "probe.weight: must have the shape (4, 32), not (3, 32)"),
    "rank": (lambda t: t | {SECOND: torch.zeros(4, 32, 2)}, "low_rank.second: must have the shape (4, 32, 3), not"),
    "flat": (lambda t: t | {FIRST: t[FIRST].flatten()}, "low_rank.first: must have the shape (4, 3, 32), not (384,)"),
    "empty": (lambda t: t | {BIAS: torch.zeros(0)}, "bias: must have the shape (4, 32), not (0,)"),
    "integer": (lambda t: t | {BIAS: t[BIAS].long()}, "bias: must hold floating-point numbers, not int64"),
    "float8": (lambda t: t | {BIAS: t[BIAS].to(torch.float8_e4m3fn)}, "bias: must hold floating-point numbers, not fl"),
    "complex": (lambda t: t | {NEURONS: t[NEURONS] + 0j}, "neurons.index: must hold whole numbers, not complex64"),
    "fraction": (lambda t: t | {NEURONS: t[NEURONS].float()}, "neurons.index: must hold whole numbers, not float32"),
    "yes-or-no": (lambda t: t | {NEURONS: t[NEURONS] > 0}, "neurons.index: must hold whole numbers, not bool"),
    "nan": (lambda t: t | {PROBE: t[PROBE] * float("nan")}, "probe.weight: holds numbers that are not finite"),
    "infinite": (lambda t: t | {BIAS: t[BIAS] + float("inf")}, "bias: holds numbers that are not finite"),
    "double": (lambda t: t | {BIAS: t[BIAS].double() + 1e300}, "bias: holds numbers too large for bfloat16"),
    "single": (lambda t: t | {BIAS: t[BIAS] * 0 + 3.4e38}, "bias: holds numbers too large for bfloat16"),
    "negative": (lambda t: t | {NEURONS: -1 - t[NEURONS]}, "neurons.index: holds negative numbers"),
    "twice": (lambda t: t | {NEURONS: t[NEURONS] * 0 + 3}, "neurons.index: names a neuron twice"),
}


@pytest.mark.parametrize(("change", "mistake"), WRONG.values(), ids=WRONG)
def test_a_file_with_other_tensors_is_refused_in_one_sentence(
    change: Callable[[Tensors], Tensors], mistake: str, tmp_path: Path
) -> None:
    profile = full()
    tensors = change(tensors_of(profile))
    save_with(tmp_path / "p.yaml", save(tensors), profile)
    with pytest.raises(ProfileError) as caught:
        load_profile(tmp_path / "p.yaml")
    message = str(caught.value)
    assert message.isprintable()
    assert message.startswith(f"{tmp_path / 'w.safetensors'}: {mistake}")
    assert len(message) < 400
    with pytest.raises(ProfileError, match=f"^The weights: {re.escape(mistake)}"):
        profile.with_weights(Weights(tensors))


NO_SAFETENSORS: dict[str, Callable[[], bytes]] = {
    "empty": lambda: b"",
    "pickle": lambda: b"\x80\x04\x95" + bytes(100),
    "zip": lambda: b"PK\x03\x04" + bytes(100),
    "cut": lambda: full().weights.data[:-1],
    "longer": lambda: full().weights.data + b"\0",
    "huge-header": lambda: (2**63).to_bytes(8, "little") + b"{}",
    "header-no-json": lambda: (4).to_bytes(8, "little") + b"{{{{",
    "outside": lambda: header({"bias": {"dtype": "F32", "shape": [4], "data_offsets": [100, 116]}}) + bytes(16),
}


def header(tensors: object) -> bytes:
    written = json.dumps(tensors).encode()
    return len(written).to_bytes(8, "little") + written


@pytest.mark.parametrize("data", NO_SAFETENSORS.values(), ids=NO_SAFETENSORS)
def test_what_is_no_safetensors_file_is_refused_although_its_hash_is_right(
    data: Callable[[], bytes], tmp_path: Path
) -> None:
    save_with(tmp_path / "p.yaml", data(), full())
    with pytest.raises(ProfileError, match=r"w\.safetensors: not a safetensors file \([A-Za-z]+\)$"):
        load_profile(tmp_path / "p.yaml")


@pytest.mark.parametrize(
    "spoil", [lambda file: None, lambda file: file.mkdir(), lambda file: file.symlink_to(file.name)]
)
def test_a_file_that_cannot_be_read_is_one_sentence(spoil: Callable[[Path], None], tmp_path: Path) -> None:
    folder = tmp_path / "line\nbreak"
    profile = full()
    save_profile(profile, folder / "p.yaml")
    file = folder / str(profile.compensation.file)
    file.unlink()
    spoil(file)
    with pytest.raises(ProfileError, match=r"safetensors: cannot be read \(.+\), and the profile needs it$") as caught:
        load_profile(folder / "p.yaml")
    assert str(caught.value).isprintable()


@pytest.fixture(params=[True, False], ids=["with-weights", "without"])
def refusal(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], str]:
    """Saves a profile; called, the sentence with which it is refused, without the name of its weights file."""
    save_profile(full(), tmp_path / "p.yaml")

    def refuse() -> str:
        with pytest.raises(ProfileError) as caught:
            load_profile(tmp_path / "p.yaml", with_weights=request.param)
        return str(caught.value).partition(".safetensors: ")[2]

    return refuse


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """The weights of that profile."""
    return tmp_path / str(full().compensation.file)


def test_a_file_larger_than_its_tensors_is_not_read(refusal: Callable[[], str], file: Path) -> None:
    numbers = sum(tensor.numel() for tensor in tensors_of(full()).values())
    os.truncate(file, 2**36)  # takes no space
    assert refusal() == f"larger than the {8 * numbers + 2**16} bytes that its tensors can take"


def test_a_link_is_not_followed(refusal: Callable[[], str], file: Path) -> None:
    kept = file.rename(file.with_name("kept"))
    for target in (kept, Path("/dev/zero"), Path("/etc/passwd")):
        file.symlink_to(target)
        assert refusal().startswith("cannot be read (")
        file.unlink()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes with names")
def test_a_pipe_is_not_waited_for(refusal: Callable[[], str], file: Path, tmp_path: Path) -> None:
    file.unlink()
    os.mkfifo(file)
    assert refusal() == "cannot be read (No regular file), and the profile needs it"
    (tmp_path / "p.yaml").unlink()
    os.mkfifo(tmp_path / "p.yaml")
    with pytest.raises(ProfileError, match=r"p\.yaml: cannot be read \(No regular file\)$"):
        load_profile(tmp_path / "p.yaml")


def test_without_its_weights_a_profile_is_compared_with_their_header(tmp_path: Path) -> None:
    for change in ("missing", "shape", "layers", "integer", "fraction"):
        alter, mistake = WRONG[change]
        save_with(tmp_path / "p.yaml", save(alter(tensors_of(full()))), full())
        with pytest.raises(ProfileError, match=re.escape(f"w.safetensors: {mistake}")):
            load_profile(tmp_path / "p.yaml", with_weights=False)


def test_a_profile_that_needs_no_weights_takes_none() -> None:
    assert make_profile().weight_shapes == {}
    with pytest.raises(ProfileError, match=r"^The weights: bias: this rule with this kind has no such tensor$"):
        make_profile().with_weights(Weights({BIAS: torch.zeros(4, 32)}))


def test_weights_of_a_profile_that_is_written_over_go_with_it_unless_another_names_them(tmp_path: Path) -> None:
    old, new = full(), make_compensated("mean", rule="predicted-damage", threshold=0.01)
    for name in ("p.yaml", "q.yaml"):
        save_profile(old, tmp_path / name)
    (tmp_path / "weights-000000000000.safetensors").touch()
    for name, left in (("p.yaml", {old.compensation.file}), ("q.yaml", set())):
        save_profile(new, tmp_path / name)
        files = {"p.yaml", "q.yaml", "weights-000000000000.safetensors", new.compensation.file}
        assert {file.name for file in tmp_path.iterdir()} == files | left
    save_profile(new, tmp_path / "p.yaml")
    assert load_profile(tmp_path / "p.yaml").weights == new.weights
