"""The quality budget of a usable profile. Beyond it the text that the model writes changes for the worse, visibly."""

MAX_KL = 0.25  # nats per token
MIN_TOP1_AGREEMENT = 0.80
