"""How each rule is chosen and fitted: its compiler half, by the rule's name."""

from ffnskip_cli.calibration.rules.base import RuleCompiler
from ffnskip_cli.calibration.rules.cosine.compiler import CosineCompiler
from ffnskip_cli.calibration.rules.predicted_damage import PredictedDamageCompiler
from ffnskip_cli.calibration.rules.price import PriceCompiler
from ffnskip_cli.calibration.settings import Settings

_COMPILERS: dict[str, type[RuleCompiler]] = {
    "cosine": CosineCompiler,
    "predicted-damage": PredictedDamageCompiler,
    "price": PriceCompiler,
}


def register(rule: str, compiler: type[RuleCompiler]) -> None:
    """Compile the rule of this name so, instead of as `RuleCompiler` does."""
    _COMPILERS[rule] = compiler


def compiler_of(settings: Settings) -> RuleCompiler:
    """The compiler of the settings' rule."""
    return _COMPILERS.get(settings.rule, RuleCompiler)(settings)


__all__ = ["RuleCompiler", "compiler_of", "register"]
