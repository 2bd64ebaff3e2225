"""Feed the profile loader millions of broken inputs: whatever the bytes, it may raise ProfileError and nothing else.

    make fuzz RUNS=1000000

With atheris the inputs are guided by what they reach in the code; without it (it has no wheels for every Python), valid
inputs are mutated blindly. The first byte of an input chooses what the rest is: a profile, or the weights of one.
"""

import hashlib
import random
import sys
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
ATTACKS = Path(__file__).parents[1] / "runtime" / "attacks"
PROFILE, WEIGHTS = b"P", b"W"
MOST_BYTES = 4096


def target(folder: Path) -> tuple[Callable[[bytes], None], list[bytes]]:
    """What is to be fed, with a folder that it may write to, and valid inputs to start from."""
    from support.factories import full, make_profile

    from ffnskip.errors import ProfileError
    from ffnskip.profiles.profile import dump_profile, load_profile, parse_profile

    whole, place = full(), "0" * 64
    named = whole.compensation.model_copy(update={"file": "w.safetensors", "sha256": place})
    text = dump_profile(whole.model_copy(update={"compensation": named}))
    assert whole.weights is not None

    def sentence(error: ProfileError) -> str:
        assert str(error).isprintable()
        return "refused"

    def verdict(with_weights: bool) -> str:
        try:
            load_profile(folder / "p.yaml", with_weights=with_weights)
        except ProfileError as error:
            return sentence(error)
        return "read"

    def feed_profile(data: bytes) -> None:
        try:
            profile = parse_profile(data)
        except ProfileError as error:
            sentence(error)
        else:
            assert parse_profile(dump_profile(profile)) == profile

    def feed(data: bytes) -> None:
        if data[:1] != WEIGHTS:
            feed_profile(data[1:])
            return
        (folder / "w.safetensors").write_bytes(data[1:])
        (folder / "p.yaml").write_text(text.replace(place, hashlib.sha256(data[1:]).hexdigest()))
        if verdict(with_weights=False) == "refused":
            assert verdict(with_weights=True) == "refused"
        else:
            verdict(with_weights=True)

    valid = [PROFILE + text.encode(), PROFILE + dump_profile(make_profile()).encode(), WEIGHTS + whole.weights.data]
    return feed, valid + [PROFILE + path.read_bytes() for path in sorted(ATTACKS.glob("*.yaml"))]


def guided(runs: int, folder: Path) -> None:
    """By atheris; it ends the process."""
    import atheris

    with atheris.instrument_imports(include=["ffnskip", "yaml"]):
        feed, seeds = target(folder)
    corpus = folder / "corpus"
    corpus.mkdir()
    for number, seed in enumerate(seeds):
        (corpus / f"{number:03}").write_bytes(seed)
    options = [f"-runs={runs}", f"-max_len={MOST_BYTES}", f"-artifact_prefix={Path.cwd()}/", "-print_final_stats=1"]
    atheris.Setup([sys.argv[0], *options, str(corpus)], feed)
    atheris.Fuzz()


def blind(runs: int, folder: Path) -> None:
    """By mutations drawn from a fixed seed; a failure is raised with its input."""
    feed, seeds = target(folder)
    draw = random.Random(0)
    for _ in range(runs):
        data = mutated(draw.choice(seeds), draw.choice(seeds), draw)
        try:
            feed(data)
        except BaseException:
            print(f"Failed on {data!r}", file=sys.stderr)
            raise
    print(f"{runs} inputs: nothing but ProfileError")


def mutated(data: bytes, other: bytes, draw: random.Random) -> bytes:
    """Some bytes changed, removed, repeated, or taken from elsewhere; the first one stays."""
    body = bytearray(data[1:])
    for _ in range(draw.randint(1, 8)):
        start = draw.randint(0, len(body))
        end = min(start + draw.choice((1, 1, 1, 4, 16, 64)), len(body))
        change = draw.randrange(5)
        if change == 0:
            body[start:end] = draw.randbytes(end - start)
        elif change == 1:
            del body[start:end]
        elif change == 2:
            body[start:start] = body[start:end]
        elif change == 3:
            body[start:start] = draw.choice((b"\n", b": ", b"- ", b"{", b"}", b"[", b"'", b'"', b"\xff", b"9" * 20))
        else:
            place = draw.randint(0, len(other))
            body[start:end] = other[place : place + end - start]
    return data[:1] + bytes(body[:MOST_BYTES])


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        wanted = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
        (guided if find_spec("atheris") else blind)(wanted, Path(scratch))
