"""The command line: exit codes, messages without traceback, paths relative to the user's folder."""

from __future__ import annotations

import subprocess
import sys

import pytest
from conftest import ROOT, emonb


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--profile", "huge"], "unknown profile 'huge'"),
        (["run", "--datasets", "mini-fy"], "unknown dataset 'mini-fy'"),
        (["run", "--datasets", "a", "--images", "nowhere"], "nowhere is no folder"),
        (["run", "--force", "cooking"], "unknown stage cooking"),
        (["run", "--seeds", "one"], "seeds"),
        (["run", "--out", "pyproject.toml/out"], "cannot write"),
        (["predict", "missing.png", "--model", "emonb"], "missing.png: no such picture"),
        (["predict", "pyproject.toml", "--model", "missing"], "missing: no such model folder"),
        (["notebooks", "--out", "missing"], "run.json"),
    ],
)
def test_users_mistake_is_one_message(arguments, message):
    result = emonb(*arguments)
    assert result.returncode == 1
    assert message in result.output
    assert result.output.startswith("emonb: ")
    assert "Traceback" not in result.output


def test_unknown_option_is_the_parsers_own_error():
    result = emonb("run", "--colour", "red")
    assert result.returncode == 2
    assert "Traceback" not in result.output


def test_help_names_the_commands():
    result = emonb("--help")
    assert result.returncode == 0
    for command in ("run", "base", "doctor", "predict", "notebooks"):
        assert command in result.output


def test_import_and_help_load_nothing_heavy():
    code = (
        "import sys, emonb, emonb.cli, emonb.store, emonb.run, emonb.workspace\n"
        "heavy = {'torch', 'transformers', 'pandas', 'matplotlib', 'papermill'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_paths_are_relative_to_the_users_folder(tmp_path):
    inside = ROOT / "tests"
    result = emonb("run", "--datasets", "fi", "--images", "notebooks", cwd=inside)
    assert f"no folder {ROOT / 'tests' / 'notebooks' / 'fi'}" in result.output


def test_doctor_reports_line_by_line():
    result = emonb("doctor", "--out", "build")
    lines = result.output.strip().splitlines()
    failed = [line for line in lines if not line.startswith("[OK] ")]
    assert not [line for line in failed if not line.startswith("[FAIL] free ")], "only memory and disk may lack here"
    assert result.returncode == bool(failed)
    assert len(lines) == 8
