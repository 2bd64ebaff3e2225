"""`ffnskip eval`: the tasks of the paper, what is kept of them, and the figures that come of them."""

import ffnskip_cli.lm_eval  # noqa: F401 - says so where lm-eval is not installed
