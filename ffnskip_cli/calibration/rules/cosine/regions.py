"""Find the cold regions, the layers at both ends that are never skipped, from the mean similarity curve."""

from dataclasses import dataclass

from torch import Tensor

from ffnskip.errors import FfnskipError

STEEP = 2.5  # a layer is steep when it turns the stream this many times as much as the median layer
MARGIN = 1  # layers beside the steep ends that stay cold too


@dataclass(frozen=True)
class Region:
    """The skip region ``[cold_s, cold_e)``."""

    cold_s: int
    cold_e: int


def find_region(mean_similarity: Tensor) -> Region:
    """Choose the skip region from the mean similarity of each layer, ``[n_layers]``.

    The paper looks for a monotone rise at the start and a monotone fall at the end, but real curves dip on the way:
    SmolLM2-135M starts at 0.06, lies between 0.95 and 0.98 with dips at layers 20 and 23, and ends at 0.74. What does
    stand out is how much more the first and last layers turn the stream, ``1 - similarity``, than the median layer
    does. So the region begins behind the last steep layer of the first half, ends before the first one of the second
    half, and keeps one layer's distance from both, because a layer beside a steep end still lies on the slope.

    Raises:
        FfnskipError: fewer than two layers remain, so that nothing could ever be skipped.
    """
    turn = 1.0 - mean_similarity
    n_layers = len(turn)
    steep = [layer for layer in range(n_layers) if turn[layer] > STEEP * turn.median()]
    middle = n_layers / 2
    cold_s = max((layer + 1 for layer in steep if layer < middle), default=0) + MARGIN
    cold_e = min((layer for layer in steep if layer >= middle), default=n_layers) - MARGIN
    if cold_e - cold_s < 2:
        raise FfnskipError(
            "The similarity curve has no plateau of at least two layers to skip in: choose the region yourself with "
            "--cold-s and --cold-e."
        )
    return Region(cold_s, cold_e)
