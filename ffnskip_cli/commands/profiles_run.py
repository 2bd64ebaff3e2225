"""What `ffnskip profiles` does."""

from __future__ import annotations

from ffnskip.errors import FfnskipError
from ffnskip.profiles.identity import refuse_other_architecture
from ffnskip.profiles.locate import Located, locate_all, shared_profiles
from ffnskip.profiles.profile import load_profile
from ffnskip.profiles.schema import ModelInfo
from ffnskip_cli import console
from ffnskip_cli.commands.profiles import Options
from ffnskip_cli.report.tables import Column, Row, print_json, render
from ffnskip_cli.sources.models import describe_model

_COLUMNS = [
    Column("profile", "profile"),
    Column("rule", "rule"),
    Column("flops_saved_past_warm_up", "FLOPs saved past warm-up", ".1%"),
    Column("kl", "KL", ".3f"),
    Column("top1_agreement", "top-1 agreement", ".3f"),
    Column("within_budget", "within budget"),
    Column("checked", "checked"),
]


def run(options: Options) -> None:
    """Print a row for each profile that fits; say on stderr why the others do not."""
    place = options.place or str(shared_profiles())
    found = locate_all(place, offline=options.offline)
    model = describe_model(
        options.model,
        revision=options.revision,
        trust_remote_code=options.trust_remote_code,
        offline=options.offline,
    )
    rows: list[Row] = []
    others: list[Row] = []
    for located in found:
        try:
            rows.append(_row(located, model))
        except FfnskipError as error:
            others.append({"profile": located.name, "reason": str(error)})
    if options.format == "json":
        document = {"schema": "ffnskip-profiles/v1", "model": model.id, "from": place}
        print_json(document | {"profiles": rows, "others": others})
    elif rows:
        render(rows, _COLUMNS, options.format)
    console.talk.print(f"{len(rows)} of {len(found)} profiles in {place} fit {model.id}", highlight=False, markup=False)
    for other in others:
        reason = str(other["reason"]).removeprefix(f"{other['profile']}: ")
        console.talk.print(f"{other['profile']}: {reason}", highlight=False, markup=False)


def _row(located: Located, model: ModelInfo) -> Row:
    """What there is to say of a profile; raises ProfileError for one that is broken or made for another model."""
    profile = load_profile(located, with_weights=False)
    refuse_other_architecture(profile, model)
    row: dict[str, object] = {"profile": located.name, "rule": profile.skip.rule}
    for figure in ("flops_saved_past_warm_up", "kl", "top1_agreement", "within_budget"):
        row[figure] = None if profile.measured is None else getattr(profile.measured, figure)
    same = [
        what
        for what, field in (("GGUF file", "gguf_sha256"), ("commit", "revision"))
        if getattr(model, field) is not None and getattr(model, field) == getattr(profile.model, field)
    ]
    return row | {"checked": ", ".join(["architecture", *same])}
