"""Other people's machines: users without a name or a home, terminals, paths, file systems, limits, full disks."""

import errno
import getpass
import os
import pwd
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, emonb

from emonb import cli, headless
from emonb.headless import run
from emonb.machine import settle


def test_a_user_without_name_and_home_gets_both_for_this_process(monkeypatch):
    def unknown(*_):
        raise KeyError("getpwuid(): uid not found: 12345")

    homes = ("HOME", "IPYTHONDIR", "MPLCONFIGDIR", "JUPYTER_RUNTIME_DIR")
    for name in (*homes, "LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    settle()
    assert getpass.getuser() == "nobody"
    for name in homes:
        (Path(os.environ[name]) / "written").touch()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-16"])
def test_a_terminal_that_cannot_show_a_character_ends_nothing(encoding):
    options = {"text": False, "env": {**os.environ, "PYTHONIOENCODING": encoding}}
    process = emonb("\u732b-\U0001f642", **options)
    said = process.communicate()[0].decode(encoding, "replace")  # click writes UTF-8 to a terminal that says ascii
    assert process.returncode == 2
    assert "No such command" in said
    assert "Traceback" not in said


def test_few_open_files_are_one_line():
    process = emonb("doctor", preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64)))
    said = process.communicate()[0]
    told = "emonb: only 64 files may be open at a time here, and 256 are needed: ulimit -n 4096\n"
    assert (process.returncode, said) == (1, told)


NO_LOCKS = """import errno, fcntl, sys
from pathlib import Path
from emonb.errors import EmonbError
from emonb.files import locked

def refuse(*_):
    raise OSError(getattr(errno, code), "not here")

fcntl.flock, lock, busy = refuse, Path(sys.argv[1], ".lock"), ""
for code in ("ENOSYS", "EOPNOTSUPP", "ENOLCK", "EINVAL"):
    with locked(lock):
        try:
            with locked(lock, "busy here"):
                pass
        except EmonbError as error:
            busy += str(error)
    with locked(lock, "busy here"):
        pass
print(busy)"""


def test_a_file_system_without_locks_is_said_once_and_markers_serve(tmp_path):
    process = subprocess.run([sys.executable, "-c", NO_LOCKS, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert process.stdout == 4 * "busy here" + "\n"
    assert process.stderr.startswith("emonb: no file locks here (flock)")
    assert process.stderr.count("\n") == 1


def test_any_letters_may_stand_in_a_path(tmp_path, notebook_folder, monkeypatch):
    monkeypatch.setattr(headless, "write_report", lambda out: None)
    odd = tmp_path / "\u041c\u043e\u0439 {seed0} {} {v!r} [a] 100% #2 \u732b"
    odd.mkdir()
    folder = notebook_folder("saves_table").rename(odd / "notebooks")
    out = run("smoke", out=str(odd / "out {x}"), images=str(odd), folder=folder)
    assert (out / "tables" / "saved.csv").is_file()


SAID = {
    "ENOSPC": "make room",
    "EDQUOT": "make room",
    "EROFS": "set OUT",
    "EMFILE": "ulimit -n",
    "EIO": "the disk fails",
    "ENAMETOOLONG": "name another file",
    "ESTALE": "name another file",
}


@pytest.mark.parametrize("code", SAID)
def test_what_the_system_refuses_is_one_line_with_a_remedy(monkeypatch, capsys, code):
    def full():
        raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)), "some/file")

    monkeypatch.setattr(cli, "app", full)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    told = capsys.readouterr().err
    assert (ended.value.code, told.count("\n"), told[:17]) == (1, 1, "emonb: some/file:")
    assert SAID[code] in told
