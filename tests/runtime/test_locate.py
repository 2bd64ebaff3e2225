"""Profiles by name: a path, a file or a repository of the Hugging Face Hub, or one that comes with ffnskip."""

from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from support.factories import MEASURED, full, make_profile
from support.hub import COMMIT, OnlineHub, cache_repository
from support.pico import pico_model, pico_profile
from support.sentences import sentence

import ffnskip
from ffnskip.errors import FfnskipError, ProfileError
from ffnskip.profiles.identity import shared_profile
from ffnskip.profiles.locate import locate, locate_all, shared_profiles
from ffnskip.profiles.profile import Profile, load_profile, save_profile


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.fixture
def one(cache: Path, tmp_path: Path) -> Profile:
    """The profile that `org/one` holds, in a folder, beside another tool's YAML."""
    profile = full()
    save_profile(profile, tmp_path / "one" / "sub [1]" / "a.yaml")
    (tmp_path / "one" / "mergekit.yml").write_text("merge_method: slerp\n")
    cache_repository(cache, "org/one", tmp_path / "one")
    return profile


NAMES = ["org/one", "org/one@main", f"org/one@{COMMIT}", "hf://org/one", "hf://org/one/sub [1]/a.yaml"]


@pytest.mark.parametrize("name", [*NAMES, "hf://org/one/sub [1]/a.yaml@main"])
def test_a_name_on_the_hub_gives_profile_weights_and_commit(one: Profile, name: str) -> None:
    loaded = load_profile(name)
    assert loaded == one
    assert loaded.weights == one.weights
    assert locate(name).name == f"hf://org/one/sub [1]/a.yaml@{COMMIT}"


def test_weights_come_from_the_commit_that_the_profile_came_from(
    one: Profile, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = OnlineHub(monkeypatch, cache)
    assert load_profile("hf://org/one/sub [1]/a.yaml@v2").weights == one.weights
    (repo, revision, _), (same, commit, weights) = hub.fetched
    assert (repo, revision, same, commit) == ("org/one", "v2", "org/one", COMMIT)
    assert len(weights) == 1
    assert weights[0].endswith(str(one.compensation.file))


def test_what_the_hub_gives_is_not_believed(one: Profile, cache: Path) -> None:
    (link,) = cache.rglob("weights-*.safetensors")
    data = bytearray(link.read_bytes())
    data[-1] ^= 1
    link.resolve().write_bytes(data)
    with pytest.raises(ProfileError, match="its sha256 is another one"):
        load_profile("org/one")


def test_of_several_profiles_one_must_be_named(cache: Path, tmp_path: Path) -> None:
    for name in ("a.yaml", "b.yaml"):
        save_profile(make_profile(), tmp_path / "two" / name)
    cache_repository(cache, "org/two", tmp_path / "two")
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "config.yaml").write_text("a: 1\n")
    cache_repository(cache, "org/none", tmp_path / "none")
    names = [f"hf://org/two/{file}@{COMMIT}" for file in ("a.yaml", "b.yaml")]
    with pytest.raises(ProfileError, match=r"^org/two holds 2 profiles, so name one: ") as caught:
        locate("org/two")
    assert all(name in str(caught.value) for name in names)
    assert [located.name for located in locate_all("org/two")] == names
    with pytest.raises(ProfileError, match="holds no skip profile"):
        locate("org/none")
    with pytest.raises(ProfileError, match=r"has no file c\.yaml"):
        locate("hf://org/two/c.yaml")


def test_a_path_that_exists_always_wins(one: Profile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    here = make_profile()
    for path in ("org/one", "auto"):
        save_profile(here, path)
        assert load_profile(path) == here
    model = pico_model()
    save_profile(pico_profile(model), "auto")
    with ffnskip.apply(model, "auto") as applied:
        assert applied.profile == load_profile("auto")


@pytest.mark.parametrize("name", ["out/none.yaml", "none", "./a/b", "/a/b", "a/b/c", ""])
def test_what_can_only_be_a_path_is_not_looked_for_on_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **kwargs: pytest.fail("asked"))
    with pytest.raises(ProfileError, match="cannot be read"):
        load_profile(name)


@pytest.mark.parametrize("name", ["hf://", "hf://org", "hf://org/repo/a.yaml@", "hf://org/../a.yaml", "hf://@main"])
def test_a_wrong_name_on_the_hub_is_told_from_a_right_one(name: str) -> None:
    with pytest.raises(ProfileError, match=r"write hf://org/repo/file\.yaml@revision"):
        load_profile(name)


def test_what_is_not_cached_offline_is_one_sentence() -> None:
    said = sentence(lambda: load_profile("org/never-fetched"))
    assert "org/never-fetched is not in the local Hugging Face cache" in said


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (GatedRepoError, "is gated: accept its terms"),
        (RevisionNotFoundError, "has no such revision"),
        (RepositoryNotFoundError, "shows no profile org/one: check the spelling"),
        (TimeoutError, "could not be fetched from the Hugging Face Hub"),
    ],
)
def test_each_failure_of_the_hub_is_one_sentence(
    cache: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception], words: str
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise error.__new__(error)

    OnlineHub(monkeypatch, cache)
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", fail)
    assert words in sentence(lambda: load_profile("hf://org/one/a.yaml"))


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in the place of the one with the profiles that come with ffnskip."""
    monkeypatch.setattr("ffnskip.profiles.identity.shared_profiles", lambda: tmp_path / "shared")
    return tmp_path / "shared"


def test_auto_is_the_best_within_the_budget_of_those_made_on_this_very_model(shared: Path) -> None:
    model = pico_model()

    def share(name: str, *, saved: float, within: bool = True, **other: str) -> None:
        measured = MEASURED | {"flops_saved": saved, "within_budget": within}
        save_profile(pico_profile(model, measured=measured, **other), shared / f"{name}.yaml")

    share("other-weights", saved=0.9, weights_sha256="0" * 64)
    share("other-architecture", saved=0.8, config_sha256="0" * 64)
    share("over-budget", saved=0.7, within=False)
    with pytest.raises(FfnskipError, match=r"^No profile within the quality budget .*`ffnskip calibrate "):
        ffnskip.apply(model, "auto")
    share("little", saved=0.1)
    share("more", saved=0.2)
    assert Path(shared_profile(model)).name == "more.yaml"
    with ffnskip.apply(model, "auto") as applied:
        assert applied.profile.measured.flops_saved == 0.2
    assert ffnskip.Decoder(model, "auto").profile.measured.flops_saved == 0.2


def test_shared_profiles_are_found_in_a_clone() -> None:
    assert [path.path for path in locate_all(shared_profiles()) if "smollm2-135m-instruct" in path.name]
