"""When to skip: one object for each rule. Importing this imports no torch."""

from ffnskip.errors import FfnskipError
from ffnskip.rules.base import Rule, SkipSettings, Turn, may_skip
from ffnskip.rules.cosine import Cosine
from ffnskip.rules.predicted_damage import PredictedDamage
from ffnskip.rules.price import Price

_RULES: dict[str, Rule] = {}


def register(rule: Rule) -> None:
    """Make a rule known by its name; raises FfnskipError if another one has it."""
    if _RULES.setdefault(rule.name, rule) is not rule:
        raise FfnskipError(f"There is a rule named {rule.name} already.")


def rule_named(name: str) -> Rule:
    """The rule of that name; raises KeyError if there is none."""
    return _RULES[name]


def rule_names() -> tuple[str, ...]:
    """The names of all rules, in the order in which they were registered."""
    return tuple(_RULES)


for _rule in (Cosine(), PredictedDamage(), Price()):
    register(_rule)

__all__ = ["Rule", "SkipSettings", "Turn", "may_skip", "register", "rule_named", "rule_names"]
