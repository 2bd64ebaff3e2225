"""Measurements of what skipping saves and costs: pure numbers, no printing."""
