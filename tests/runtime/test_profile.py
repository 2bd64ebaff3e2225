"""The profile file: what is written can be read back, in one form only, and numbers mean what YAML 1.2 says."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from support.factories import TEXT, make_compensated, make_profile

from ffnskip.errors import ProfileError
from ffnskip.profiles import evidence, strict_yaml
from ffnskip.profiles.evidence import SimilarityCurve
from ffnskip.profiles.profile import Profile, dump_profile, json_schema, load_profile, parse_profile, save_profile

SCHEMA_FILE = Path(__file__).parents[2] / "profiles" / "schema.json"


def full_profile(**overrides: object) -> Profile:
    text = "Not worth it: the perplexity rises from 7.04 to 1e16, and that's more than its 0.1 of noise."
    verdict = {"target_ratio": 0.25, "verdict": text, "within_budget": False}
    shares = {"skip_ratio": 0.251, "flops_saved": -1e-05, "never_skip_fraction": 0.004, "top1_agreement": 1}
    costs = {"perplexity_dense": 7.04, "perplexity": 1e16, "kl": 4.1e-07, "tokens": 8192}
    errors = {"standard_error": {"perplexity": 0.1, "kl": 1e-07}, "first_skipped": (0.0, 0.1, 0.2, 0.3, 0.0, 0.0)}
    fit = {"tokens": 4096, "text_sha256": "0123" * 16, "gradient_tokens": 512, "ridge": 1e-07, "ratio": 0.25}
    rule = {"cold_s": 1, "cold_e": 5}
    candidates = (
        evidence.Candidate(**rule, window=1, refresh_every=None, kl=0.04, standard_error=0.0),
        evidence.Candidate(**rule, window=None, refresh_every=6, kl=0.4, standard_error=0.03),
    )
    trial = evidence.WarmUpTrial(warm_up=25, kl=0.04, standard_error=0.0, repetition=0.2)
    sections = {
        "calibration": evidence.CalibrationText(**TEXT, seed=0, dtype="bfloat16", on="text"),
        "evaluation": evidence.EvaluationText(**TEXT),
        "similarity": SimilarityCurve(mean=(0.9,) * 6, low=(-1,) * 6, high=(1.0,) * 6),
        "search": evidence.Search(ratio=0.25, tokens=2048, candidates=candidates, warm_up=(trial,)),
        "fit": evidence.Fit(**fit, kl=(0.2, 0.1, 0.11)),
        "measured": evidence.Measured(**verdict, **shares, **costs, **errors),
        "curve": (evidence.CurvePoint(0.99, 0.05, 0.01), evidence.CurvePoint(0.98, 0.25, 0.04)),
        "made_with": {"torch": "2.13", "ffnskip": "0.1.0"},
    }
    return make_profile(**(sections | overrides))


finite = st.floats(allow_nan=False, allow_infinity=False)
words = st.text(min_size=1, max_size=64).filter(str.isprintable)
NUMBERS_IN_DISGUISE = ["2.13", "1e3", "1E5", "0o17", "0x1F", "0123", "089", "12:30", ".5", "5.", ".nan"]
WORDS_IN_DISGUISE = ["yes", "on", "No", "null", "~", "<<", "=", "#", "!x", "&x", "*x", "%x", "- a", "a: b"]
tricky_words = words | st.sampled_from(NUMBERS_IN_DISGUISE + WORDS_IN_DISGUISE)


@pytest.mark.parametrize("profile", [make_profile(), full_profile()], ids=["small", "full"])
def test_a_dumped_profile_reads_back_equal_and_dumps_to_the_same_bytes(profile: Profile) -> None:
    text = dump_profile(profile)
    assert parse_profile(text) == profile
    assert dump_profile(parse_profile(text)) == text


@settings(deadline=None)
@given(
    threshold=finite,
    warm_up=st.integers(0, 2**63 - 1),
    curve=st.lists(st.tuples(finite, st.floats(0, 1), finite), max_size=5),
    made_with=st.dictionaries(tricky_words, tricky_words, max_size=5),
    model_type=tricky_words,
)
def test_any_valid_profile_survives_both_versions_of_yaml(**fields: object) -> None:
    profile = make_profile(**fields)
    text = dump_profile(profile)
    assert parse_profile(text) == profile
    plain = yaml.safe_load(text)
    assert Profile.model_validate(plain) == profile
    assert isinstance(plain["skip"]["threshold"], float)


def test_equal_profiles_give_the_same_bytes() -> None:
    one = full_profile(threshold=0.0, made_with={"a": "1", "b": "2"})
    other = full_profile(threshold=-0.0, made_with={"b": "2", "a": "1"})
    assert one == other
    assert dump_profile(one) == dump_profile(other)


def test_the_written_form_is_for_people() -> None:
    text = dump_profile(full_profile())
    lines = text.splitlines()
    assert "schema: ffnskip/v1" in lines
    assert "compensation: {kind: none}" in lines
    assert "- [0.99, 0.05, 0.01]" in lines
    assert "\nskip: {rule: cosine, cold_s: 1, cold_e: 5, threshold: 0.9, warm_up: 2" in text
    assert "flops_saved: -1.0e-05\n" in text
    names = [field.alias or name for name, field in Profile.model_fields.items()]
    assert list(yaml.safe_load(text)) == [name for name in names if name != "parts"]  # which is another rule's
    sections = yaml.safe_load(dump_profile(make_profile()))
    assert set(sections) == {"schema", "model", "skip", "compensation", "made_with"}  # and no absent ones
    text = dump_profile(full_profile(revision="1" * 40, config_sha256="12e45678" * 8))
    assert f'revision: "{"1" * 40}"' in text
    assert f'config_sha256: "{"12e45678" * 8}"' in text
    assert not re.search(r"[^\"0-9a-f][0-9a-f]{40}", text)  # hashes are always quoted


def test_the_compensation_names_its_file_and_leaves_out_what_it_has_not() -> None:
    text = dump_profile(make_compensated("low-rank", rule="predicted-damage", rank=3))
    compensation = yaml.safe_load(text)["compensation"]
    assert list(compensation) == ["kind", "rank", "file", "sha256"]
    assert compensation["file"] == f"weights-{compensation['sha256'][:12]}.safetensors"
    assert f'sha256: "{compensation["sha256"]}"' in text


NUMBERS = "1e-3=0.001 1E+3=1000.0 .5=0.5 5.=5.0 -0=0 +12=12 0123456=123456 089=89 0o17=15 0x1F=31"
SCALARS: list[tuple[str, object]] = [
    *((written, json.loads(meaning)) for written, meaning in (pair.split("=") for pair in NUMBERS.split())),
    *((text, text) for text in ["0b11", "1_000", "12:30", "2020-01-01", "yes", "No", "on", "off", "tRUE", "="]),
    *((written, written.lower() == "true") for written in ("True", "FALSE")),
    *((written, None) for written in ("~", "Null", "")),
    *(("'1'", "1"), ('"null"', "null"), ("|\n  1", "1"), ("-.Inf", float("-inf")), (".NaN", float("nan"))),
]


@pytest.mark.parametrize(("written", "meaning"), SCALARS)
def test_scalars_are_read_as_yaml_1_2_reads_them(written: str, meaning: object) -> None:
    value = strict_yaml.load(f"key: {written}".encode(), "p.yaml")["key"]
    assert repr(value) == repr(meaning)


@pytest.mark.parametrize(
    ("written", "mistake"),
    [
        ("[0.1, 0.2]", "measured.first_skipped: must hold 6 numbers, one per layer, not 2"),
        ("[]", "measured.first_skipped: must hold 6 numbers, one per layer, not 0"),
        ("[0.0, 0.1, 1.2, 0.3, 0.0, 0.0]", "measured.first_skipped.2: must be less than or equal to 1, not 1.2"),
        ("[0.0, 0.1, yes, 0.3, 0.0, 0.0]", 'measured.first_skipped.2: must be a number, not "yes"'),
        ("0.5", "measured.first_skipped: must be a list, not 0.5"),
    ],
)
def test_a_share_for_every_layer_or_none(written: str, mistake: str) -> None:
    text = dump_profile(full_profile()).replace("[0.0, 0.1, 0.2, 0.3, 0.0, 0.0]", written)
    with pytest.raises(ProfileError, match=f"^p.yaml: {re.escape(mistake)}"):
        parse_profile(text, "p.yaml")


def test_optional_keys_may_be_left_out_and_whole_numbers_be_where_a_float_is_asked() -> None:
    text = dump_profile(make_profile())
    pruned = text.replace(", window: null, refresh_every: null", "").replace("  gguf_sha256: null\n", "")
    assert parse_profile(pruned) == make_profile()
    threshold = parse_profile(text.replace("threshold: 0.9", "threshold: 1")).skip.threshold
    assert (threshold, type(threshold)) == (1.0, float)
    text = dump_profile(full_profile())
    older = text.replace("  first_skipped: [0.0, 0.1, 0.2, 0.3, 0.0, 0.0]\n", "")
    assert older != text
    assert parse_profile(older).measured.first_skipped is None


def test_a_profile_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        make_profile().skip.threshold = 0.5


def test_save_and_load(tmp_path: Path) -> None:
    path = tmp_path / "smollm2" / "0.25.yaml"
    save_profile(full_profile(), path)
    assert load_profile(path) == load_profile(str(path)) == full_profile()
    assert path.read_bytes() == dump_profile(full_profile()).encode()
    save_profile(make_profile(), path)
    assert load_profile(path) == make_profile()
    assert os.listdir(path.parent) == ["0.25.yaml"]


@pytest.mark.parametrize("profile", [full_profile(), make_compensated("mean")], ids=["alone", "with-weights"])
def test_a_save_that_fails_leaves_the_old_file_and_no_litter(
    profile: Profile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "p.yaml"
    save_profile(make_profile(), path)

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(ProfileError, match=r"p\.yaml: cannot be written \(No space left on device\)$"):
        save_profile(profile, path)
    assert load_profile(path) == make_profile()
    assert os.listdir(tmp_path) == ["p.yaml"]


@pytest.mark.parametrize("name", ["missing.yaml", "folder", "file/p.yaml", "nul\0l.yaml", "x" * 5000])
def test_a_file_that_cannot_be_read_or_written_is_one_sentence(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(ProfileError, match="cannot be read") as caught:
        load_profile(tmp_path / name)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300
    if name != "missing.yaml":
        with pytest.raises(ProfileError, match="cannot be written"):
            save_profile(make_profile(), tmp_path / name)


def test_a_profile_too_large_to_load_is_not_written(tmp_path: Path) -> None:
    layers = (0.1234567890123456,) * 10_000
    profile = make_profile(n_layers=10_000, similarity=SimilarityCurve(mean=layers, low=layers, high=layers))
    with pytest.raises(ProfileError, match="larger than 256 KiB"):
        save_profile(profile, tmp_path / "p.yaml")
    assert not os.listdir(tmp_path)


def test_the_module_prints_the_schema() -> None:
    command = [sys.executable, "-m", "ffnskip.profiles"]
    printed = subprocess.run(command, capture_output=True, check=True, text=True).stdout
    assert printed == SCHEMA_FILE.read_text(encoding="utf-8")


def test_the_schema_accepts_profiles_and_refuses_others() -> None:
    validator = jsonschema.Draft202012Validator(json_schema())
    validator.check_schema(json_schema())
    tree = yaml.safe_load(dump_profile(full_profile()))
    validator.validate(tree)
    validator.validate(yaml.safe_load(dump_profile(make_compensated("linear", rule="predicted-damage", neurons=4))))
    tree["skip"]["treshold"] = 0.5
    assert [error.json_path for error in validator.iter_errors(tree)] == ["$.skip"]


def test_every_field_of_the_schema_says_what_it_is() -> None:
    schema = json_schema()
    sections = {"Profile": schema} | schema["$defs"]
    for name, section in sections.items():
        for field, content in section.get("properties", {}).items():
            described = content if "description" in content else section_of(schema, content)
            assert described["description"], f"{name}.{field}"


def section_of(schema: dict[str, Any], field: dict[str, Any]) -> dict[str, Any]:
    reference = field["$ref"] if "$ref" in field else field["anyOf"][0]["$ref"]
    return schema["$defs"][reference.removeprefix("#/$defs/")]
