"""The command line: exit codes, messages without traceback, paths relative to the user's folder, nothing heavy."""

import re
import subprocess
import sys

import pytest
from conftest import ROOT

from emonb import cli
from emonb.cli import main


@pytest.fixture
def emonb(monkeypatch, capsys):
    """Calls the command line in this process; returns the exit code and what was printed."""

    def call(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["emonb", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, "".join(capsys.readouterr())

    return call


MISTAKES = {
    "run --profile huge": "unknown profile 'huge'",
    "run --datasets mini-fy": "unknown dataset 'mini-fy'; drawn ones are mini-fi",
    "run --datasets a --images nowhere": "nowhere is no folder",
    "run --force cooking": "force: unknown stage cooking; use one of: samples, triplets, features",
    "run --keep cooking": "keep: unknown stage cooking",
    "run --seeds one": "seeds",
    "run --out pyproject.toml/out": "out: cannot write (Not a directory); choose another folder with OUT",
    "run --notebooks 12": "notebooks 12: there is 01, 02",
    "run --max-cost 1": "--max-cost: is about a served model; name it with --ask MODEL",
    "run --no-price": "--no-price: is about a served model; name it with --ask MODEL",
    "run --ask-images 0": "--ask-images: is about a served model; name it with --ask MODEL",
    "run --ask m --price 1": "price: '1' is not IN,OUT",
    "stage cooking --out OUT": "stage 'cooking': unknown; use one of samples, triplets",
    "triplets --dataset a,b": "--dataset 'a,b': name one dataset",
    "triplets --dataset=": "--dataset '': name one dataset",
    "predict missing.png --model emonb": "missing.png: no such picture",
    "predict pyproject.toml --model missing": "missing: no such model folder",
    "report --out missing": "missing: no such results folder",
    "report --out ~/missing": "/home/missing: no such results folder",
    "notebooks --out missing": "missing: no results folder; make one with: python -m emonb run",
    "notebooks --out=~/missing": "/home/missing: no results folder",
    "run --datasets x --images ~/missing": "images: /home/missing is no folder",
    "run --datasets x --images RING": "ring is no folder",
    "stage samples --out RING": "ring: cannot write",
    "doctor --out DEEP": "cannot write",
    **dict.fromkeys(
        (
            "predict LONG",
            "run --out LONG",
            "run --datasets x --images LONG",
            "run --profile LONG.yaml",
            "run --review LONG",
            "report --out LONG",
            "data import folder LONG --out OUT",
        ),
        300 * "x",
    ),
}


@pytest.mark.parametrize("command", MISTAKES)
def test_a_users_mistake_is_one_message(emonb, tmp_path, monkeypatch, command):
    monkeypatch.setenv("HOME", "/home")
    (tmp_path / "ring").symlink_to("ring")
    places = {"OUT": "out", "LONG": 300 * "x", "DEEP": 1500 * "y/", "RING": "ring"}
    code, told = emonb(*(re.sub("[A-Z]{3,}", lambda it: str(tmp_path / places[it[0]]), a) for a in command.split()))
    assert (code, told[:7], told.count("\n")) == (1, "emonb: ", 1)
    assert MISTAKES[command] in told


@pytest.mark.parametrize("command", ["report --out=_", "doctor --out=_", "predict _", "compare _ _", "run --images=_"])
def test_a_blank_is_no_path(emonb, command):
    for blank in ("", " ") if "run" not in command else (" ",):  # of a run "" means the profile's
        code, told = emonb(*[part.replace("_", blank) for part in command.split()])
        assert code == 2
        assert "is blank; name a file or folder" in told


def test_what_is_no_file_s_fault_is_no_message(monkeypatch):
    def broken():
        raise ConnectionError("ours")

    monkeypatch.setattr(cli, "app", broken)
    with pytest.raises(ConnectionError, match="ours"):
        cli.main()


def test_paths_are_relative_to_the_users_folder(emonb, monkeypatch):
    monkeypatch.chdir(ROOT / "tests")
    _, told = emonb("run", "--datasets", "fi", "--images", "notebooks")
    assert f"{ROOT / 'tests' / 'notebooks' / 'fi'}: no such folder" in told


def test_help_names_the_commands_and_an_unknown_option_is_the_parsers_error(emonb):
    code, told = emonb("--help")
    assert code == 0
    for command in ("run", "report", "stage", "triplets", "data", "predict", "rehearse", "doctor", "notebooks"):
        assert f"\n  {command} " in told
    assert emonb("run", "--colour", "red")[0] == 2


def test_doctor_reports_line_by_line(emonb, tmp_path):
    lines = emonb("doctor", "--out", str(tmp_path))[1].strip().splitlines()
    assert len(lines) == 4
    failed = [line for line in lines if not line.startswith("[OK] ")]
    assert not [line for line in failed if not line.startswith("[FAIL] free ")], "only memory and disk may lack here"


def test_import_and_help_load_nothing_heavy():
    code = """import sys, emonb.store
from emonb.cli import app
app(["run", "--help"], standalone_mode=False)
assert not {'torch', 'transformers', 'pandas', 'matplotlib', 'papermill'} & set(sys.modules)"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
