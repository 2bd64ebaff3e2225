"""A profile on any model, through its own forward pass."""
