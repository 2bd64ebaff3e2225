"""How each rule is chosen and fitted."""
