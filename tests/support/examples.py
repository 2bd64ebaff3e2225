"""How many examples Hypothesis draws: few and the same ones in the suite, or as many new ones as EXAMPLES says."""

import os

from hypothesis import HealthCheck, settings

_MANY = os.environ.get("EXAMPLES")
few = settings(
    max_examples=int(_MANY or 15),
    derandomize=not _MANY,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
