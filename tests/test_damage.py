"""Bytes of our own files flipped or cut: an `EmonbError`, or what was there before, and never another exception."""

import random
import shutil

import pytest
import torch
from pipeline import DATASET

from emonb.annotate.request import load_prices
from emonb.errors import EmonbError
from emonb.files import resource_path
from emonb.model import EmoVLMKD
from emonb.predictions import read_predictions
from emonb.settings import TripletSettings
from emonb.store import Store
from emonb.triplets import read_triplets

pytestmark = pytest.mark.usefixtures("one_thread")


def outcomes(files, count, read):
    """What `read` says, "" or its error, of each of `count` damages to each file: three of four are a bit flipped."""
    told, rng = [], random.Random(0)
    for file in files:
        whole = file.read_bytes()
        for n in range(count):
            data = bytearray(whole)
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            file.write_bytes(data if n % 4 else whole[: rng.randrange(len(whole))])
            told.append("")
            try:
                read()
            except EmonbError as error:
                told[-1] = str(error)
                assert file.stem in told[-1] or file.parent.name in told[-1], (file, n)
                assert len(told[-1].splitlines()) == 1
        file.write_bytes(whole)
    return told


@pytest.fixture
def copy(tiny, tmp_path):
    """The tiny run in a folder of its own."""
    shutil.copytree(tiny.run.out, tmp_path / "out")
    return tmp_path / "out"


def test_a_model_folder(copy, tiny):
    folder, picture = copy / "models" / DATASET, tiny.run.samples(DATASET, "test")["path"].tolist()[:1]
    right = EmoVLMKD.from_pretrained(folder)(picture)

    def read():
        assert torch.equal(EmoVLMKD.from_pretrained(folder)(picture), right)

    told = outcomes([path for path in sorted(folder.rglob("*")) if path.is_file()], 6, read)
    assert all("copy the folder again" in line or "delete it" in line for line in told if line)
    assert sum(map(bool, told)) > 0.8 * len(told)
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"sha256"', '"digests"'))  # as earlier versions wrote it
    (folder / "gate.safetensors").write_bytes((folder / "gate.safetensors").read_bytes()[:-9])
    with pytest.raises(EmonbError, match=r"gate.safetensors: damaged, or of another model"):
        EmoVLMKD.from_pretrained(folder)
    shutil.rmtree(folder / "adapter")
    with pytest.raises(EmonbError, match=r"adapter: damaged, or of another model"):
        EmoVLMKD.from_pretrained(folder)


def test_an_entry_of_the_store(copy):
    root = copy / "artifacts"
    for stage in ("head", "teacher"):
        (pointer,) = (root / stage).glob("*.json")
        entry = Store(root).find(stage, pointer.stem)
        right = {path.name: path.read_bytes() for path in entry.path.iterdir()}

        def read(stage=stage, pointer=pointer, right=right):
            found = Store(root).find(stage, pointer.stem).path
            for name in right.keys() - {"provenance.json"}:
                assert (found / name).read_bytes() == right[name]

        told = outcomes([pointer, *sorted(entry.path.iterdir())], 8, read)
        assert all("run notebook" in line for line in told if line)
        assert sum(map(bool, told)) > 0.6 * len(told)


def test_predictions(copy):
    file = copy / "predictions" / f"{DATASET}__vit.parquet"
    right = read_predictions(file)

    def read():
        assert read_predictions(file).equals(right)

    assert sum(map(bool, outcomes([file], 40, read))) > 20


def test_prices_and_triplets(copy, tmp_path):
    """Texts that people edit: whatever is read has the form that others rely on."""
    shutil.copy(resource_path("prices.yaml"), tmp_path / "own.yaml")
    terms, file = TripletSettings(prices=str(tmp_path / "own.yaml")), copy / "triplets" / f"{DATASET}.jsonl"

    def priced():
        assert all(price["input"] >= 0 <= price["output"] for price in load_prices(terms)["models"].values())

    def taught():
        assert not read_triplets(file)["response"].str.len().min() <= 0

    assert any(outcomes([tmp_path / "own.yaml"], 120, priced))
    assert any(outcomes([file], 120, taught))
