"""The command line and the compiler of skip profiles."""
