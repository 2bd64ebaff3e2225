"""One module per command: parse, call, render. Nothing heavy is imported before a command runs."""
