"""All rooms together on a tiny world, with the taxonomy given in scrambled order; the assembled model."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from pipeline import make_tree, run_stages, tiny_workspace

from emonb import data, emotions, features, metrics, triplets, tuning, vlm
from emonb.emotions import Taxonomy, parse_emotion
from emonb.errors import EmonbError
from emonb.model import EmoVLMKD, model_stage
from emonb.predictions import read_predictions
from emonb.samples import read_samples
from emonb.store import read_json

ORDER = ("sadness", "joy", "anger")
COLUMNS = [f"p_{label}" for label in ORDER]


@pytest.fixture(scope="module")
def world(tmp_path_factory, untrained_base):
    folder = tmp_path_factory.mktemp("world")
    make_tree(folder / "images" / "colours", {"train": 16, "val": 6, "test": 8})
    patch = pytest.MonkeyPatch()
    patch.setattr(emotions, "TAXONOMIES", {"scrambled": Taxonomy("scrambled", ORDER)})
    ws = tiny_workspace(folder, untrained_base, folder / "images", "colours")
    made = run_stages(ws, "colours")
    made["model"] = model_stage(ws.settings, ws.store, "colours", vlm.load_vlm(ws.settings.vlm))
    yield ws, made, folder
    patch.undo()


def test_labels_keep_their_order_from_teacher_to_gate(world):
    """Colours are easy: were one index exchanged anywhere, accuracy would fall to a third or below."""
    _, made, _ = world
    for stage, file in (("teacher", "predictions"), ("head", "head"), ("gate", "emovlmkd"), ("gate", "gate_cross")):
        frame = read_predictions(made[stage].path / f"{file}.parquet", ORDER)
        test = frame[frame["split"] == "test"]
        assert metrics.accuracy(test) > 90, (stage, file)
        assert test.loc[test["prediction"] == "joy", "p_joy"].gt(1 / 3).all()
    assert read_json(made["teacher"].path / "config.json")["labels"] == list(ORDER)
    assert read_json(made["gate"].path / "gates.json")["labels"] == list(ORDER)


def test_reloaded_model_equals_the_stored_predictions(world):
    ws, made, _ = world
    model = EmoVLMKD.from_pretrained(ws.out / "models" / "colours")
    test = read_samples(made["samples"], "test")
    got = model.predict(test["path"].tolist(), batch_size=5)
    stored = read_predictions(made["gate"].path / "emovlmkd.parquet").query("seed == 0").set_index("image_id")
    stored = stored.loc[test["image_id"]]
    assert got["emotion"].tolist() == stored["prediction"].tolist()
    np.testing.assert_allclose(got[COLUMNS], stored[COLUMNS], atol=1e-3)
    answer = read_predictions(made["vlm_predictions"].path / "predictions.parquet").set_index("image_id")
    assert got["vlm"].tolist() == answer.loc[test["image_id"], "prediction"].tolist()


def test_saved_again_it_is_the_same(world, tmp_path):
    ws, made, _ = world
    model = EmoVLMKD.from_pretrained(ws.out / "models" / "colours")
    model.save_pretrained(tmp_path / "again")
    paths = read_samples(made["samples"], "test")["path"].tolist()[:6]
    twin = EmoVLMKD.from_pretrained(tmp_path / "again")
    assert torch.equal(model(paths), twin(paths))
    assert "tmp" not in (tmp_path / "again" / "adapter" / "adapter_config.json").read_text().replace(
        ws.settings.vlm.base, ""
    )


def test_unparsable_text_gives_the_gate_zeros(world):
    """The untrained VLM writes nonsense when it generates: no class may come of it."""
    ws, made, _ = world
    model = EmoVLMKD.from_pretrained(ws.out / "models" / "colours")
    paths = read_samples(made["samples"], "test")["path"].tolist()[:3]
    parts = model.parts(paths, generate=True)
    for text, row in zip(parts["texts"], parts["vlm"], strict=True):
        assert row.sum() == (parse_emotion(text, ORDER) is not None)
    assert model.parse("{'emotion': 'anger'}").tolist() == [0, 0, 1]
    assert model.parse("no idea").tolist() == [0, 0, 0]
    generated = read_predictions(made["vlm_predictions"].path / "generated.parquet")
    assert (generated["prediction"] == "").equals(~generated["parsed"])


def test_losses_of_the_article_s_sketch(world):
    logits, labels = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    assert EmoVLMKD.gate_loss(logits, labels) == torch.nn.functional.cross_entropy(logits, labels)
    same = EmoVLMKD.distillation_loss(logits, logits, labels, alpha=1.0, tau=2.0)
    assert same.item() == pytest.approx(0, abs=1e-6)


def test_keywords_never_reach_a_model_at_test(world):
    """Captions may change; nothing but the triplets and what is tuned on them may change with them."""
    _, made, _ = world
    for stage in ("features", "teacher", "head", "gate"):
        text = str(made[stage].provenance["params"])
        assert "caption" not in text
    assert "triplets" not in str(made["features"].provenance["inputs"])


def test_without_token_cache_the_answers_are_the_same(world, untrained_base):
    """The paper profile streams pictures: same stages, no cache."""
    _, made, folder = world
    other = tiny_workspace(folder / "stream", untrained_base, folder / "images", "colours", cache_visual_tokens=False)
    again = run_stages(other, "colours")
    for stage in ("base_predictions", "vlm_predictions"):
        one, two = (read_predictions(m[stage].path / "predictions.parquet") for m in (made, again))
        assert one["image_id"].tolist() == two["image_id"].tolist()
        np.testing.assert_allclose(one[COLUMNS], two[COLUMNS], atol=5e-3)


def test_everything_again_is_equal(world, untrained_base):
    """Two runs with one seed give equal predictions."""
    _, made, folder = world
    again = run_stages(tiny_workspace(folder / "again", untrained_base, folder / "images", "colours"), "colours")
    files = {"vlm_predictions": "predictions", "teacher": "predictions", "head": "head", "gate": "emovlmkd"}
    for stage, file in files.items():
        frames = [read_predictions(m[stage].path / f"{file}.parquet") for m in (made, again)]
        pd.testing.assert_frame_equal(*frames, check_exact=True)
    assert {s: a.key for s, a in made.items() if s != "model"} == {s: a.key for s, a in again.items()}


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(EmonbError, match=r"config\.json missing"):
        EmoVLMKD.from_pretrained(tmp_path)


def test_a_killed_tuning_goes_on_from_its_checkpoint(world, untrained_base, monkeypatch):
    """What comes out is what an uninterrupted tuning gives, to the bit; no step before the checkpoint runs again."""
    _, made, folder = world
    monkeypatch.setattr(tuning, "_SAVE_EVERY", 4)
    ws = tiny_workspace(folder / "killed", untrained_base, folder / "images", "colours")
    data.samples_stage(ws.settings, ws.store, "colours")
    triplets.triplets_stage(ws.settings, ws.store, "colours")
    base = vlm.load_vlm(ws.settings.vlm)
    features.features_stage(ws.settings, ws.store, "colours", base)
    steps, plain = [], tuning.response_loss

    def loss(*arguments, **options):
        steps.append(1)
        if len(steps) == 7:
            raise KeyboardInterrupt
        return plain(*arguments, **options)

    monkeypatch.setattr(tuning, "response_loss", loss)
    with pytest.raises(KeyboardInterrupt):
        tuning.adapter_stage(ws.settings, ws.store, "colours", base)
    (parts,) = (ws.store.root / "adapter").glob(".*.parts")
    assert [p.name for p in parts.iterdir()] == ["checkpoint-4"]
    again = tuning.adapter_stage(ws.settings, ws.store, "colours", base)
    total = read_json(made["adapter"].path / "history.json")[-1]["step"]
    assert len(steps) == 7 + total - 4
    assert again.key == made["adapter"].key
    assert again.digest == made["adapter"].digest
    assert not list((ws.store.root / "adapter").glob(".*.parts"))
