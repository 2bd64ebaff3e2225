"""From text to a skip profile, one file per step; `docs/method.md` has them in their order."""
