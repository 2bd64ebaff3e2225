"""`ffnskip eval` where lm-eval is not installed; `test_lm_eval.py` has the rest."""

import sys
from pathlib import Path

import pytest
from support.cli import mistake


def test_what_is_not_installed_is_named_with_the_extra_that_installs_it(
    plateau_folder: Path, plateau_profiles: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in list(sys.modules):
        if module.startswith(("ffnskip_cli.lm_eval", "ffnskip_cli.commands.eval_run", "ffnskip_cli.evaluation")):
            monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    sentence = mistake("eval", plateau_folder, "--profile", plateau_profiles / "0.05.yaml", "--tasks", "any")
    assert "ffnskip[eval]" in sentence
