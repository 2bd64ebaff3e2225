"""Recording a text in shares, and after an interruption: always the same statistics, bit for bit."""

import itertools
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from support.calibrations import corpus_of, paper_settings
from support.pico import pico_model, pico_source, pico_tokens
from torch import Tensor

from ffnskip import FfnskipError
from ffnskip_cli.calibration.lab import Lab
from ffnskip_cli.calibration.recording import collect as module
from ffnskip_cli.calibration.recording.collect import Ranks, Share, collect, identity_of, kept_files
from ffnskip_cli.calibration.recording.file import Identity, Statistics, load_statistics
from ffnskip_cli.calibration.settings import Goal, On
from ffnskip_cli.progress import Track, silently

LENGTHS: dict[On, int] = {"text": 12, "generated": 256}
SEQUENCES: dict[On, int] = {"text": 9, "generated": 35}  # three blocks of at most 16
ONE = Ranks()


class Two(Ranks):
    """One of two ranks in one process, of which rank 1 sends what it has recorded to rank 0."""

    def __init__(self, rank: int, sent: list[Tensor], other: Any = None) -> None:
        super().__init__(rank, 2)
        object.__setattr__(self, "sent", sent)
        object.__setattr__(self, "other", other)

    def gather(self, facts: Any) -> list[Any]:
        return [facts, self.other or facts]

    def add_up(self, tensor: Tensor) -> None:
        if self.rank:
            self.sent.append(tensor.clone())
        else:
            tensor += self.sent.pop(0)

    def wait(self) -> None:
        pass


class Killed(BaseException):
    """Unlike an Exception, nothing on the way may swallow it."""


def killed_after(count: int) -> Track:
    def stopping(steps: Iterable[Any], description: str, total: int) -> Iterable[Any]:
        yield from itertools.islice(steps, count)
        raise Killed

    return stopping


def counting(left: list[int]) -> Track:
    def note(steps: Iterable[Any], description: str, total: int) -> Iterable[Any]:
        left.append(total)
        return steps

    return note


def setup(on: On = "text", seed: int = 0, track: Track = silently) -> tuple[Lab, Identity, Tensor]:
    model = pico_model(max_position_embeddings=256)
    tokens = pico_tokens(LENGTHS[on], batch=SEQUENCES[on], seed=seed)
    settings = paper_settings(Goal("target_ratio", 0.1), sequence_length=LENGTHS[on], warm_up=0, on=on)
    return Lab(model, track), identity_of(pico_source(model), corpus_of(tokens), settings), tokens


@cache
def record_whole(on: On = "text") -> Statistics:
    return collect(*setup(on), Share(), ONE)


def assert_same(one: Statistics, other: Statistics) -> None:
    assert one.identity == other.identity
    assert torch.equal(one.done, other.done)
    assert torch.equal(one.record.sequences, other.record.sequences)
    assert torch.equal(one.record.values, other.record.values)


@pytest.mark.parametrize("on", ["text", "generated"])
def test_shares_put_together_are_what_one_machine_records(tmp_path: Path, on: On) -> None:
    paths = [tmp_path / name for name in "abc"]
    parts = [collect(*setup(on), Share(i, 3, path), ONE) for i, path in enumerate(paths)]
    assert sum(len(part.done) - part.missing for part in parts) == SEQUENCES[on]
    assert max(part.missing for part in parts) < SEQUENCES[on]
    assert_same(load_statistics(paths), record_whole(on))


def test_ranks_share_a_shard_between_them() -> None:
    places = [
        int(place)
        for index in range(2)
        for rank in range(3)
        for block in Share(index, 2).blocks(Ranks(rank, 3), 20, "text")
        for place in block
    ]
    assert sorted(places) == list(range(20))
    whole_shard = [int(place) for block in Share(1, 2).blocks(ONE, 20, "text") for place in block]
    assert sorted(places[10:]) == whole_shard


def test_what_killed_ranks_have_left_is_taken_over_by_any_number_of_them(tmp_path: Path) -> None:
    left: list[int] = []
    share = Share(path=tmp_path / "whole", resume=True)
    for rank in range(2):
        with pytest.raises(Killed):
            collect(*setup(track=killed_after(2)), share, Two(rank, []))
    assert [path.name for path in kept_files(tmp_path / "whole")] == ["whole.1-of-2", "whole.2-of-2"]
    assert_same(collect(*setup(track=counting(left)), share, ONE), record_whole())
    assert left == [SEQUENCES["text"] - 2 - 2]


def test_more_ranks_than_blocks_is_no_mistake(tmp_path: Path) -> None:
    share = Share(SEQUENCES["text"] + 3, SEQUENCES["text"] + 5, tmp_path / "own", resume=True)
    for _ in range(2):
        assert collect(*setup(), share, ONE).missing == SEQUENCES["text"]


def test_ranks_that_record_different_texts_are_refused() -> None:
    other = setup(seed=1)[1].facts()
    with pytest.raises(FfnskipError, match=r"^rank 1 does not fit rank 0: tokens_sha256 is \w+ and not \w+\.$"):
        collect(*setup(), Share(), Two(0, [], other))


@pytest.mark.parametrize("after", [0, 1, 8])
def test_an_interrupted_recording_goes_on_where_it_stopped(tmp_path: Path, after: int) -> None:
    left: list[int] = []
    share = Share(path=tmp_path / "own", resume=True)
    with pytest.raises(Killed):
        collect(*setup(track=killed_after(after)), share, ONE)
    assert_same(collect(*setup(track=counting(left)), share, ONE), record_whole())
    assert left == [SEQUENCES["text"] - after]


def test_what_was_saved_survives_a_kill_without_time_to_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[int] = []

    def save_unless_dead(statistics: Statistics, path: Path) -> None:
        if len(saved) < 4:
            saved.append(len(statistics.done) - statistics.missing)
            save(statistics, path)
        else:
            raise Killed

    save = Statistics.save
    monkeypatch.setattr(module, "SECONDS_BETWEEN_SAVES", 0.0)
    monkeypatch.setattr(Statistics, "save", save_unless_dead)
    share = Share(path=tmp_path / "own", resume=True)
    with pytest.raises(Killed):
        collect(*setup(), share, ONE)
    monkeypatch.undo()
    assert saved == [1, 2, 3, 4]
    assert load_statistics([tmp_path / "own"]).missing == SEQUENCES["text"] - 4
    assert_same(collect(*setup(), share, ONE), record_whole())


def test_without_resume_an_old_file_is_not_read(tmp_path: Path) -> None:
    collect(*setup(), Share(path=tmp_path / "own"), ONE)
    lab, identity, tokens = setup(seed=1)
    collect(lab, identity, tokens, Share(path=tmp_path / "own"), ONE)
    assert load_statistics([tmp_path / "own"]).identity == identity
