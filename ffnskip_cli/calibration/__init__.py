"""From text to a skip profile, one file per step: corpus, record, regions, solve, verify, compile."""
