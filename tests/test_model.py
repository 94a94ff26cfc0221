"""All rooms together on the tiny run, and the assembled model: saved = loaded = stored predictions."""

import numpy as np
import pytest
from pipeline import DATASET, tiny_profile

from emonb.data import parse_emotion
from emonb.errors import EmonbError
from emonb.files import file_digest, read_json, write_json
from emonb.metrics import accuracy
from emonb.model import EmoVLMKD
from emonb.predictions import read_predictions
from emonb.run import make_with_needs

ORDER = ["positive", "negative"]  # the taxonomy's; folders are listed the other way round
COLUMNS = [f"p_{label}" for label in ORDER]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(tiny):
    return EmoVLMKD.from_pretrained(tiny.run.out / "models" / DATASET)


@pytest.fixture(scope="module")
def shown(tiny):
    return tiny.run.samples(DATASET, "test")


def stored(tiny, stage, file="predictions", run=None):
    return read_predictions(tiny.artifact(stage, run).path / f"{file}.parquet", ORDER)


def test_labels_keep_their_order_from_teacher_to_gate(tiny, model):
    """Colours are easy: were one index exchanged anywhere, nothing would be right."""
    for stage, file in (("teacher", "predictions"), ("head", "head"), ("gate", "emovlmkd"), ("gate", "gate_cross")):
        frame = stored(tiny, stage, file).query("split == 'test'")
        assert accuracy(frame) > 90, (stage, file)
        assert frame.loc[frame["prediction"] == "positive", "p_positive"].gt(0.5).all()
    for stage, file in (("samples", "meta"), ("teacher", "config"), ("head", "heads"), ("gate", "gates")):
        assert read_json(tiny.artifact(stage).path / f"{file}.json")["labels"] == ORDER == model.labels
    with pytest.raises(EmonbError, match="class order"):
        read_predictions(tiny.artifact("gate").path / "emovlmkd.parquet", ORDER[::-1])


def test_the_loaded_model_gives_the_stored_predictions(tiny, model, shown):
    got = model.predict(shown["path"].tolist(), batch_size=5)
    gate = stored(tiny, "gate", "emovlmkd").query("repeat == 0").set_index("image_id").loc[shown["image_id"]]
    assert got["emotion"].tolist() == gate["prediction"].tolist()
    np.testing.assert_allclose(got[COLUMNS], gate[COLUMNS], atol=1e-3)
    answers = stored(tiny, "vlm_predictions").set_index("image_id").loc[shown["image_id"]]
    assert got["vlm"].tolist() == answers["prediction"].tolist()
    np.testing.assert_allclose(got["vlm_confidence"], answers[COLUMNS].max(axis=1), atol=1e-3)
    said = answers[answers["raw_text"] != ""]["raw_text"]
    assert len(said) == tiny.run.settings.vlm.reasons
    paths = shown.set_index("image_id")["path"]
    assert said.tolist() == model.say(paths[said.index].tolist())


def test_what_the_vlm_writes_freely_is_parsed_or_zeros(tiny, model, shown):
    """The untrained VLM writes nonsense: no class may come of it."""
    parts = model.parts(shown["path"].tolist()[:3], generate=True)
    assert parts["logits"].shape == (3, 2)
    for text, row in zip(parts["texts"], parts["vlm"], strict=True):
        assert row.sum() == (parse_emotion(text, ORDER) is not None)
    assert model.parse("{'emotion': 'negative'}").tolist() == [0, 1]
    assert model.parse("no idea").tolist() == [0, 0]
    generated = stored(tiny, "vlm_predictions", "generated")
    assert (generated["prediction"] == "").equals(~generated["parsed"])


def test_what_is_no_model_is_named(tiny, tmp_path):
    with pytest.raises(EmonbError, match=r"config\.json missing"):
        EmoVLMKD.from_pretrained(tmp_path)
    vlm = tiny.run.settings.vlm.model_dump(mode="json") | {"base": "nobody/nothing"}
    write_json(tmp_path / "config.json", {"vlm": vlm})
    with pytest.raises(EmonbError, match="hf download nobody/nothing"):
        EmoVLMKD.from_pretrained(tmp_path)


def test_without_stored_tokens_the_answers_are_the_same(tiny, tmp_path):
    """The paper's profile streams pictures."""
    profile = tiny_profile(tmp_path / "tiny.yaml", tiny.run.settings.vlm.base, cache_visual_tokens=False)
    run, said = tiny.open(tmp_path / "out", profile=profile), []
    for stage in ("base_predictions", "vlm_predictions"):
        make_with_needs(run, stage, say=said.append)
        one, two = stored(tiny, stage), stored(tiny, stage, run=run)
        assert one["image_id"].tolist() == two["image_id"].tolist()
        np.testing.assert_allclose(one[COLUMNS], two[COLUMNS], atol=5e-3)
    assert [line.split(" of ")[0] for line in said[:3]] == ["samples", "features", "base_predictions"]
    folders = [tiny.artifact("features", r).path for r in (tiny.run, run)]
    assert not list(folders[1].glob("*.safetensors"))
    np.testing.assert_array_equal(*(np.load(folder / "val.pooled.npy") for folder in folders))


def test_a_result_of_other_pictures_is_not_mixed_in(tiny, tmp_path):
    run = tiny.again(tmp_path, without=["base_predictions"])
    ids = tiny.artifact("features", run).path / "ids.json"
    ids.write_text(ids.read_text().replace("negative/0", "negative/x"))
    made = read_json(ids.with_name("provenance.json"))
    write_json(ids.with_name("provenance.json"), {**made, "sha256": {**made["sha256"], "ids.json": file_digest(ids)}})
    with pytest.raises(EmonbError, match="made of other samples"):
        run.make("base_predictions")
