"""Renderings of what was measured: tables, JSON, curves in the terminal, pictures."""
