"""Nobody's files are overwritten: every command that writes a folder leaves one alone that is not of emonb."""

import json
import shutil

import pytest
from conftest import ROOT
from release_folders import make_tree

from emonb.cli import main
from emonb.errors import EmonbError
from emonb.files import claim_folder, refuse_foreign

COMMANDS = [
    "run --profile smoke --out THEIRS",
    "stage samples --profile smoke --out THEIRS",
    "triplets --dataset mini-fi --profile smoke --out THEIRS",
    "report --out THEIRS",
    "rehearse --profile smoke --model stand-in --out THEIRS",
    "data import flickr SOURCE --out OUT --name theirs",
    "notebooks --out RUN",
]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", ["index.html", "run.json", "import.json"])
def test_a_folder_of_somebody_else_is_left_alone(tmp_path, monkeypatch, capsys, command, name):
    theirs, run = tmp_path / "theirs", tmp_path / "run"
    theirs.mkdir()
    (theirs / name).write_text('{"scripts": 1}')
    run.mkdir()
    (run / "run.json").write_text('{"profile": "mini", "notebooks": {}}')
    if command.startswith("notebooks"):  # a project of their own
        shutil.copytree(theirs, tmp_path / "notebooks")
        monkeypatch.chdir(tmp_path)
    if "SOURCE" in command:
        make_tree(tmp_path / "source")
    words = {"THEIRS": theirs, "SOURCE": tmp_path / "source", "OUT": tmp_path, "RUN": run}
    monkeypatch.setattr("sys.argv", ["emonb", *(str(words.get(word, word)) for word in command.split())])
    with pytest.raises(SystemExit) as ended:
        main()
    told = capsys.readouterr().err
    assert (ended.value.code, told.count("\n")) == (1, 1), told
    assert f"holds {name} and nothing of emonb; choose a new or empty folder with" in told
    assert [(path.name, path.read_text()) for path in theirs.iterdir()] == [(name, '{"scripts": 1}')]


def test_what_is_new_empty_or_ours_is_taken(tmp_path):
    (tmp_path / "disk").mkdir()
    for name in (".DS_Store", "lost+found", "Thumbs.db"):  # what systems leave in an empty folder
        (tmp_path / "disk" / name).touch()
    for name in ("new/below", "disk"):
        folder = claim_folder(tmp_path / name)
        (folder / "more").touch()
        claim_folder(folder)
    of_old = {"run.json": {"notebooks": {}}, "import.json": {"source": "x"}, "report.json": {"steps": {}}}
    for file, content in of_old.items():
        folder = tmp_path / file.removesuffix(".json")
        folder.mkdir()
        (folder / file).write_text(json.dumps(content))
        refuse_foreign(folder, "OUT")
    refuse_foreign(ROOT / "notebooks", "", ours=True)
    (tmp_path / "file").touch()
    with pytest.raises(EmonbError, match="cannot write"):
        claim_folder(tmp_path / "file")
