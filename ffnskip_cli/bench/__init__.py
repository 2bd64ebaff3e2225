"""The tables of `ffnskip bench`: which rows there are, and where each of their figures comes from."""
