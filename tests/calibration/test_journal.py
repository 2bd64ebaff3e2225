"""What a journal remembers, and what it must not."""

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ffnskip import FfnskipError
from ffnskip_cli.progress import Journal


def never() -> int:
    raise AssertionError("was computed again")


def test_a_value_is_computed_once_for_each_key_without_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    journal = Journal()
    assert journal.remember_tensors("key", lambda: {"a": torch.ones(1)})["a"].tolist() == [1]
    assert journal.remember(["a", 1], lambda: 7) == 7
    assert journal.remember(["a", 1], never) == 7
    assert journal.remember(["a", 2], lambda: 8) == 8
    journal.discard()
    assert list(tmp_path.iterdir()) == []


def test_what_was_finished_before_a_kill_is_there_after_it_to_the_last_bit(tmp_path: Path) -> None:
    path = tmp_path / "new" / "journal"
    value = {"kl": 0.1 + 0.2, "counts": [1, 2**60], "tiny": 5e-324}
    Journal(path, "subject").remember("key", lambda: value)
    resumed = Journal(path, "subject", resume=True)
    assert resumed.remember("key", never) == value
    resumed.remember("more", lambda: 1)
    assert Journal(path, "subject", resume=True).remember("more", never) == 1


def test_a_line_that_a_kill_cut_short_is_computed_again(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    journal = Journal(path, "subject")
    journal.remember("first", lambda: 1)
    journal.remember("second", lambda: 22)
    path.write_bytes(path.read_bytes()[:-3])
    resumed = Journal(path, "subject", resume=True)
    assert resumed.remember("first", never) == 1
    assert resumed.remember("second", lambda: 23) == 23
    assert Journal(path, "subject", resume=True).remember("second", never) == 23


@pytest.mark.parametrize(("subject", "resume"), [("another", True), ("subject", False)])
def test_another_calibration_begins_anew(tmp_path: Path, subject: str, resume: bool) -> None:
    path = tmp_path / "journal"
    old = Journal(path, "subject")
    old.remember("key", lambda: 1)
    old.remember_tensors("key", lambda: {"a": torch.zeros(1)})
    new = Journal(path, subject, resume=resume)
    assert new.remember("key", lambda: 2) == 2
    assert new.remember_tensors("key", lambda: {"a": torch.ones(1)})["a"].tolist() == [1]
    assert Journal(path, subject, resume=True).remember("key", never) == 2


def test_two_runs_that_write_to_one_journal_do_not_take_each_others_figures(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    one = Journal(path, "one")
    other = Journal(path, "other")
    one.remember("key", lambda: 1)
    other.remember("key", lambda: 2)
    assert Journal(path, "other", resume=True).remember("key", never) == 2
    assert Journal(path, "one", resume=True).remember("key", never) == 1


@pytest.mark.parametrize("content", [b"\xff\x00 not a journal", b"[1]\n", b"5\n", b""])
def test_a_file_that_is_no_journal_is_begun_anew(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "journal"
    path.write_bytes(content)
    assert Journal(path, "subject", resume=True).remember("key", lambda: 1) == 1


def test_a_finished_run_leaves_no_journal(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal", "subject")
    journal.remember("key", lambda: 1)
    journal.discard()
    journal.discard()
    assert list(tmp_path.iterdir()) == []


def never_tensors() -> dict[str, Tensor]:
    raise AssertionError("was computed again")


def test_tensors_are_there_after_a_kill_to_the_last_bit_and_gone_when_the_run_is_over(tmp_path: Path) -> None:
    path = tmp_path / "own[1].journal"  # no pattern, though it looks like one
    matrix = torch.arange(6, dtype=torch.float64).view(2, 3).T / 7  # not contiguous
    tensors = {"a": matrix, "scalar": torch.tensor(0.1, dtype=torch.float64), "index": torch.tensor([3, 1])}
    Journal(path, "subject").remember_tensors("key", lambda: tensors)
    (tmp_path / "own1.journal.0.safetensors").touch()  # another run's
    resumed = Journal(path, "subject", resume=True)
    found = resumed.remember_tensors("key", never_tensors)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    other = resumed.remember_tensors("another key", lambda: {"b": torch.ones(2)})
    assert other["b"].tolist() == [1, 1]
    resumed.discard()
    assert [file.name for file in tmp_path.iterdir()] == ["own1.journal.0.safetensors"]


def test_what_a_disk_has_damaged_is_computed_again(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    journal = Journal(path, "subject")
    journal.remember("key", lambda: 1234)
    journal.remember_tensors("key", lambda: {"a": torch.ones(1)})
    (file,) = tmp_path.glob("journal.*")
    for damaged, sound in ((file, b"no tensors"), (file, file.read_bytes()[:-1] + b"x"), (file, None)):
        damaged.unlink() if sound is None else damaged.write_bytes(sound)
        resumed = Journal(path, "subject", resume=True)
        assert resumed.remember_tensors("key", lambda: {"a": torch.full((1,), 2.0)})["a"].tolist() == [2]
    path.write_bytes(path.read_bytes().replace(b"1234", b"1235"))
    assert Journal(path, "subject", resume=True).remember("key", lambda: 5) == 5


def test_tensors_that_no_line_of_the_journal_vouches_for_are_not_used(tmp_path: Path) -> None:
    """They may be those of a run that was killed before the line was on the disk."""
    path = tmp_path / "journal"
    Journal(path, "subject").remember_tensors("key", lambda: {"a": torch.ones(1)})
    path.write_text("")
    resumed = Journal(path, "subject", resume=True)
    assert resumed.remember_tensors("key", lambda: {"a": torch.zeros(1)})["a"].tolist() == [0]


@pytest.mark.skipif(os.name == "nt", reason="there are no such permissions")
def test_a_journal_that_others_can_write_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    Journal(path, "subject").remember_tensors("key", lambda: {"a": torch.ones(1)})
    (file,) = tmp_path.glob("journal.*")
    file.chmod(0o666)
    with pytest.raises(FfnskipError, match=f"{file} is a link, belongs to another user or can be written by others"):
        Journal(path, "subject", resume=True).remember_tensors("key", never_tensors)
    path.chmod(0o666)
    with pytest.raises(FfnskipError, match=f"{path} is a link, belongs to another user or can be written by others"):
        Journal(path, "subject", resume=True)


def test_what_cannot_be_written_or_read_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for use in (
        lambda: Journal(tmp_path / "file" / "journal", "subject"),
        lambda: Journal(tmp_path, "subject", resume=True),
    ):
        with pytest.raises(FfnskipError, match=r"^[^\n]+ cannot be used: [^\n]+\.$"):
            use()
