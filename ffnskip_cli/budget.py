"""Where the line is drawn: what a usable profile may cost, and what counts as a difference."""

# The quality budget. A profile beyond it is a record of what can be had, not one to decode with.
MAX_KL = 0.05  # nats per token
MIN_TOP1_AGREEMENT = 0.90

# Standard errors of a paired difference within which two measurements are taken to be the same.
NOISE = 2.0
SEARCH_NOISE = 3.0  # of a dozen candidates some are lucky, and few sequences make the errors themselves uncertain
