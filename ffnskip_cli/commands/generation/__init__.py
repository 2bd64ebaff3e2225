"""What `ffnskip generate` makes text with."""
