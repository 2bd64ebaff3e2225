"""What the rules and compensations of profiles have in common in all reports: names, units, the order of a curve."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ffnskip.profiles.profile import Profile
    from ffnskip.profiles.schema import Compensation, CurvePoint, Skip, TriedCompensation


def compensation_name(compensation: Compensation | TriedCompensation) -> str:
    """Kind and size, short: `low-rank 96 + 256 neurons`."""
    size = f" {compensation.rank}" if compensation.rank is not None else ""
    neurons = f" + {count(compensation.neurons, 'neuron')}" if compensation.neurons else ""
    return f"{compensation.kind}{size}{neurons}"


def threshold_text(skip: Skip) -> str:
    """A rule's threshold with its unit."""
    return f"{skip.threshold:g} {skip.by.unit}".rstrip()


def by_ratio(profile: Profile) -> list[CurvePoint]:
    """The curve in the order of `Profile.point_at`: of points with one ratio, the threshold that skips less is first.

    A lower similarity skips more, and so does a higher damage.
    """
    sign = 1 if profile.skip.rule == "predicted-damage" else -1
    return sorted(profile.curve, key=lambda point: (point.skip_ratio, sign * point.threshold))


def count(number: int, noun: str) -> str:
    """`1 layer`, `2 layers`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
