"""What is given in vLLM's `--additional-config`."""

import pytest

from ffnskip import FfnskipError
from ffnskip.vllm.settings import Settings


def test_without_a_profile_there_are_no_settings() -> None:
    assert Settings.read({}) is None
    assert Settings.read({"gdn_prefill_backend": "triton"}) is None


def test_settings_are_read() -> None:
    given = {"ffnskip_profile": "p.yaml", "ffnskip_target": 0.2, "gdn_prefill_backend": "triton"}
    assert Settings.read(given) == Settings("p.yaml", target=0.2)


@pytest.mark.parametrize(
    "given",
    [{"ffnskip_profil": "p.yaml"}, {"ffnskip_profile": 3}, {"ffnskip_target": 0.2}],
    ids=["unknown key", "no path", "no profile"],
)
def test_mistakes_are_said_in_one_sentence(given: dict[str, object]) -> None:
    with pytest.raises(FfnskipError, match=r"^ffnskip_profil[^\n]+\.$"):
        Settings.read(given)
