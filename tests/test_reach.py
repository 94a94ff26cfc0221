"""Keys that find their code: which stages and notebooks an edit makes anew, and which it leaves alone."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

# Runs in a copy of the package. For each edit: a process that has read no code yet says what it finds.
SCRIPT = """
import json, os, sys
from pathlib import Path
from emonb.reach import reached_by
from emonb.run import open_run
from emonb.store import STAGES, stage_code

def code_of():
    run = open_run("smoke", out="out")
    found = {name: stage_code(name) for name in STAGES}
    disk = open_run("smoke", out="out", images="images")
    found["samples"] = STAGES["samples"].recipe(run, "mini-fi").code
    found["imported"] = STAGES["samples"].recipe(disk, "mine").code
    found["triplets"] = STAGES["triplets"].recipe(run, "mini-fi", samples=None).code
    for path in sorted(Path("notebooks").glob("*.ipynb")):
        cells = json.loads(path.read_text())["cells"]
        found[path.stem[:2]] = reached_by("\\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code"))
    return found

for number, (file, old, new) in enumerate([("errors.py", "", ""), *json.loads(sys.argv[1])]):
    path = Path("emonb", file)
    text = path.read_text()
    assert old in text, f"{file} does not contain {old!r}"
    path.write_text(text.replace(old, new, 1) if old else text)
    if not os.fork():
        Path(f"{number}.json").write_text(json.dumps(code_of()))
        os._exit(0)
    assert os.wait()[1] == 0
    path.write_text(text)
"""

ASKING = "base_predictions vlm_predictions model cost"  # the assembled model holds the code that asks
SEEING = f"samples imported features adapter teacher {ASKING}"
# Edit -> file, old text, new text, the stages whose code it changes. `samples` are drawn ones, `imported` those on
# disk; triplets are the offline annotator's, who reads what `samples` has measured.
EDITS = {
    "the question": ("resources/prompts.yaml", "Which emotion does", "What emotion does", f"triplets {ASKING}"),
    "a reason": ("resources/lexicon.yaml", "What moves the viewer: {objects}", "The reason: {objects}", "triplets"),
    "as_seen": ("data.py", '"white"', '"black"', SEEING),
    "WORD_FORMS": ("data.py", '"joyous"', '"merry"', "vlm_predictions model cost"),
    "LoRA's loss": ("tuning.py", 'reduction="sum") / tokens', 'reduction="sum")', "adapter"),
    "the teacher's loop": ("teacher.py", "loss.item() * len(targets)", "loss.item()", "teacher"),
    "distillation_loss": ("distill.py", "alpha * tau**2 * kl", "alpha * tau * kl", "head"),
    "a gate's forward": ("gate.py", "weight[:, :1] * vlm", "weight[:, :1] + vlm", "gate model cost"),
    "an importer": ("releases/__init__.py", "[valence <= 4.5,", "[valence <= 4.4,", "imported"),
    "a figure": ("figures.py", 'x="epoch"', 'x="step"', ""),  # training_curves
    "a docstring": ("gate.py", "Concat & linear", "Linear", ""),
    "an error's words": ("vlm.py", "is not known to take visual tokens", "takes no tokens", ""),
    "words of an error that others raise": ("vlm.py", "No network here:", "Without a network", ""),
}


@pytest.fixture(scope="module")
def changed(tmp_path_factory):
    """Edit -> stages (and notebooks, by number) whose code it changes."""
    folder = tmp_path_factory.mktemp("copy")
    for name in ("emonb", "notebooks"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"))
    (folder / "images" / "mine").mkdir(parents=True)
    edits = json.dumps([edit[:3] for edit in EDITS.values()])
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    subprocess.run([sys.executable, "-c", SCRIPT, edits], cwd=folder, env=environment, check=True, timeout=300)
    before, *after = (json.loads((folder / f"{i}.json").read_text()) for i in range(len(EDITS) + 1))
    return {
        edit: {name for name, code in found.items() if code != before[name]}
        for edit, found in zip(EDITS, after, strict=True)
    }


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_makes_anew_what_it_changes_and_nothing_else(changed, edit):
    stages = {name for name in changed[edit] if not name.isdigit()}
    assert stages == set(EDITS[edit][3].split())
    if not stages:
        drawn = [path for path in (ROOT / "notebooks").glob("*.ipynb") if "training_curves" in path.read_text()]
        assert changed[edit] == ({path.stem[:2] for path in drawn} if edit == "a figure" else set())
