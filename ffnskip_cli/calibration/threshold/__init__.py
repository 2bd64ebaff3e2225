"""The threshold that gives a ratio or keeps a limit."""
