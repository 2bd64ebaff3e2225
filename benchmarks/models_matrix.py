"""Try the rules on a tiny random model of every decoder type that transformers has, and write docs/models.md.

    python benchmarks/models_matrix.py [TYPE ...]

takes about three minutes; with types named it prints their rows only. tests/support/model_check.py has what is checked.
"""

import sys
import time
import warnings
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from support.model_check import Verdict, check_model  # noqa: E402
from support.model_types import TYPES, UNBUILT, VISION, tiny_model  # noqa: E402

from ffnskip import FfnskipError  # noqa: E402
from ffnskip.model.neurons import count_neurons  # noqa: E402
from ffnskip.model.sites import ffn_sites  # noqa: E402
from ffnskip.model.types import refuse_type  # noqa: E402

HEAD = """# Which models can skip

Written by `python benchmarks/models_matrix.py` with transformers {transformers} and torch {torch}; do not edit.

Each type of decoder that transformers knows was built small, with random weights: {built} types, of which **{exact}
skip exactly** and {refused} are refused with the sentence in the table, from their configuration, before any weights
are loaded (the slowest refusal took {slowest:.2f} s). Exactly means: with a threshold that nothing passes, the logits
are bit-identical to the untouched model's, and so they are after the profile is taken off, with the same modules; with
every FFN skipped they are bit-identical to those of a model whose FFNs are silenced by hooks, and `generate` and
`Decoder` give the tokens of that model, from the end of the warm-up on; and with some tokens skipped, as random probes
decide, the logits are those that hooks give which go by the same probes.

- **rules**: `any`, or `input` for those that go by the FFN's input alone: `predicted-damage`, and `price` where FFN
  and attention are plain matrices. `cosine` must see the residual stream that the FFN's output is added to, and these
  models do more with it than to add.
- **Decoder**: the path that `ffnskip.Decoder` takes; `none` where only `model.generate` can be used.
- **neurons**: whether single neurons can run beside the compensation's map in all, some or no layers (`--neurons`);
  where not in all, compensation goes without.

In hybrids whose layers are a mixer *or* an FFN (Nemotron-H), profiles count the layers that have one. The oldest
transformers that ffnskip runs on does not have all of these types.

"""
TAIL = """
Not built: {unbuilt}. They are speculators of another model, need other packages, or cannot be made small. Encoders
and encoder-decoders are not decoders, and are refused.
"""


def main() -> None:
    """Check the types that were named, or all."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    named = sys.argv[1:]
    rows: list[tuple[str, Verdict]] = []
    slowest = 0.0
    lines = ["| type | rules | Decoder | neurons | refused, because |", "|---|---|---|---|---|"]
    for name in named or [*(name for name in TYPES if name not in UNBUILT), *VISION]:
        model = tiny_model(name)
        start = time.perf_counter()
        try:
            refuse_type(model.config)
            slowest, verdict = max(slowest, time.perf_counter() - start), check_model(model)
        except FfnskipError as error:
            slowest, verdict = max(slowest, time.perf_counter() - start), Verdict(sentence=str(error))
        rows.append((name, verdict))
        lines.append(_row(name, verdict, _neurons(model) if verdict.rules else ""))
        print(lines[-1], flush=True)
        if verdict.wrong:
            sys.exit(f"{name} is not exact: {', '.join(verdict.wrong)}")
    if named:
        return
    types = [verdict for name, verdict in rows if name not in VISION]
    exact = sum(bool(verdict.rules) for verdict in types)
    head = HEAD.format(
        transformers=transformers.__version__,
        torch=torch.__version__.partition("+")[0],
        built=len(types),
        exact=exact,
        refused=len(types) - exact,
        slowest=slowest,
    )
    text = head + "\n".join(lines) + "\n" + TAIL.format(unbuilt=", ".join(UNBUILT))
    (ROOT / "docs/models.md").write_text(text)


def _row(name: str, verdict: Verdict, neurons: str) -> str:
    rules = {"any": "any", "all but cosine": "input"}.get(verdict.rules, "none")
    return f"| {name} | {rules} | {verdict.path} | {neurons} | {'' if verdict.rules else verdict.sentence} |"


def _neurons(model: transformers.PreTrainedModel) -> str:
    counts = [count_neurons(site.ffn) for site in ffn_sites(model)]
    return "all" if all(counts) else "some" if any(counts) else "no"


if __name__ == "__main__":
    main()
