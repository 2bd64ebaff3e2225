"""`python -m ffnskip_cli` is `ffnskip`."""

from ffnskip_cli.app import main

main()
