"""Fit compensation and probe of the rule `predicted-damage`: docs/predicted-damage.md has the derivation."""
