"""Does the calibration text matter? The answer of a comparison's numbers, in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ffnskip_cli.calibration.compare import beyond_noise

if TYPE_CHECKING:
    from ffnskip_cli.calibration.compare import Comparison
    from ffnskip_cli.measure.quality import Estimate


def answer(comparison: Comparison) -> list[str]:
    """A few sentences: on the ratio, on the KL, and on whether the one explains the other."""
    return [_spread(comparison), _on_ratio(comparison), _on_kl(comparison), *_at_equal_ratio(comparison)]


def _spread(comparison: Comparison) -> str:
    own = [comparison.measured[i][i].skip_ratio.mean for i in range(len(comparison.texts))]
    elsewhere = [comparison.measured[row][column].skip_ratio.mean for row, column in comparison.foreign]
    return (
        f"Calibrated for a ratio of {comparison.target:g}, the profiles skip {_range(own)} of the FFNs on unseen text "
        f"of their own kind, and {_range(elsewhere)} on the other texts."
    )


def _on_ratio(comparison: Comparison) -> str:
    distances = [abs(comparison.ratio_difference(*cell)) for cell in comparison.foreign]
    row, column = comparison.foreign[distances.index(max(distances))]
    a, b = comparison.texts[row].name, comparison.texts[column].name
    ours, own = (comparison.measured[index][column].skip_ratio for index in (row, column))
    return (
        f"A profile calibrated elsewhere is up to {max(distances):.3f} away from the ratio of the text's own profile: "
        f"that of {a} skips {_plus_minus(ours)} on {b}, where that of {b} skips {_plus_minus(own)}."
    )


def _on_kl(comparison: Comparison) -> str:
    differences = [comparison.kl_difference(*cell) for cell in comparison.foreign]
    distances = [abs(difference.mean) for difference in differences]
    row, column = comparison.foreign[distances.index(max(distances))]
    a, b = comparison.texts[row].name, comparison.texts[column].name
    ours, own = (comparison.measured[index][column] for index in (row, column))
    return (
        f"Its KL differs from that of the text's own profile beyond two standard errors in {_cases(differences)}"
        f"{_directions(differences)}: at most, that of {a} costs {_plus_minus(ours.kl)} nats per token on {b} at ratio "
        f"{ours.skip_ratio.mean:.3f}, where that of {b} costs {_plus_minus(own.kl)} at {own.skip_ratio.mean:.3f}."
    )


def _at_equal_ratio(comparison: Comparison) -> list[str]:
    """KL and ratio rise together, so a difference in KL alone does not say that a profile is better."""
    others = [cell for cell in comparison.foreign if not comparison.same_rule(*cell)]
    if not others:
        return [
            "All profiles have the same rule and differ in the threshold alone, so what differs in KL comes from the "
            "ratio: the text decides where the threshold lies, and moving the threshold turns one profile into the "
            "other."
        ]
    scaled = [comparison.kl_difference_at_equal_ratio(*cell) for cell in others]
    differences = [difference for difference in scaled if difference is not None]
    if not differences:
        return []
    return [
        "A higher ratio costs more KL: taken in proportion at the ratio of the text's own profile, which is a rough "
        f"correction, the KL differs beyond two standard errors in {_cases(differences)} in which the text led to "
        f"another skip region, window, refresh or warm-up{_directions(differences)}."
    ]


def _cases(differences: Sequence[Estimate]) -> str:
    count = sum(map(beyond_noise, differences))
    return f"{count or 'none'} of {len(differences)} cases"


def _directions(differences: Sequence[Estimate]) -> str:
    found = [difference.mean for difference in differences if beyond_noise(difference)]
    higher = sum(mean > 0 for mean in found)
    return f" ({higher} higher, {len(found) - higher} lower)" if found else ""


def _range(values: Sequence[float]) -> str:
    low, high = f"{min(values):.3f}", f"{max(values):.3f}"
    return low if low == high else f"{low} to {high}"


def _plus_minus(estimate: Estimate) -> str:
    return f"{estimate.mean:.3f} ± {estimate.standard_error:.3f}"
