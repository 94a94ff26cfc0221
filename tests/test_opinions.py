"""All opinions about a picture: against the model's own numbers, and as JSON; pictures from outside."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import torch
from assembled import LABELS, assembled, picture, results
from PIL import Image

from emonb import opinions as room
from emonb.errors import EmonbError, UnreadablePicture
from emonb.opinions import find_teacher, load_teacher, opinions, opinions_figure, read_picture
from emonb.samples import read_samples
from emonb.teacher import Pictures, load_network, predict_network

KEYS = ["image", "emotion", "confidence", "models", "gate", "saliency", "key_elements", "reasons"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    model = assembled()
    return model, results(tmp_path_factory.mktemp("world"), model)


def test_the_same_as_the_models_own_answers(world):
    model, ws = world
    test = read_samples(ws.store.find("samples", "mini-fi"), "test")
    paths = test["path"].tolist()
    teacher = load_teacher(ws.store.find("teacher", "mini-fi--vit"), LABELS)
    found = opinions(model, paths, teacher=teacher)
    frame = model.predict(paths)
    net, config, labels = load_network(ws.store.find("teacher", "mini-fi--vit"))
    with torch.inference_mode():
        vit = torch.from_numpy(predict_network(net, Pictures(test, labels, config))).softmax(-1)
    for i, (opinion, row) in enumerate(zip(found, frame.to_dict("records"), strict=True)):
        assert opinion.emotion == row["emotion"]
        assert [opinion.answers["VLM"], opinion.answers["head"]] == [row["vlm"], row["head"]]
        assert opinion.confidence("head") == pytest.approx(row["head_confidence"], abs=1e-6)
        p = opinion.distributions
        assert list(p) == ["VLM", "ViT", "head", "EmoVLM-KD"]
        np.testing.assert_allclose(list(p["EmoVLM-KD"].values()), [row[f"p_{x}"] for x in LABELS], atol=1e-6)
        np.testing.assert_allclose(list(p["ViT"].values()), vit[i], atol=1e-5)
        assert opinion.lean.emotion == opinion.emotion
        assert opinion.saliency.label == row["head"]
        assert opinion.key_elements is None
        assert opinion.reasons is None


def test_keys_stay_and_texts_are_the_vlms_own(world):
    model, _ = world
    plain = opinions(model, [picture()])[0].to_dict()
    full = opinions(model, [picture()], names=["mine"], texts=True)[0].to_dict()
    assert list(plain) == list(full) == KEYS
    assert json.loads(json.dumps(full)) == full
    assert list(full["models"]) == ["VLM", "ViT", "head", "EmoVLM-KD"]
    assert full["models"]["ViT"] is None
    assert full["image"] == "mine"
    assert [full["key_elements"]] == model.say([picture()], "conversation")
    assert [full["reasons"]] == model.predict([picture()], reasons=True)["reason"].tolist()
    assert full["key_elements"] != full["reasons"]
    assert full["saliency"]["rows"] == len(full["saliency"]["tokens"])


def test_an_unreadable_free_answer_is_no_answer(world, monkeypatch):
    model, _ = world
    monkeypatch.setattr(type(model), "parse", _no_emotion)
    opinion = opinions(model, [picture()], generate=True)[0]
    assert opinion.answers["VLM"] == ""
    assert opinion.lean.vlm_says == ""
    assert "could not be read" in opinion.lean.sentence


def _no_emotion(self, text):
    return torch.zeros(len(self.labels))


def test_teacher_is_found_beside_its_model_only(world, tmp_path):
    _, ws = world
    folder = ws.out / "models" / "mini-fi"
    found = find_teacher(folder, LABELS)
    direct = load_teacher(ws.store.find("teacher", "mini-fi--vit"), LABELS)
    assert np.array_equal(found([picture()]), direct([picture()]))
    assert find_teacher(tmp_path / "mini-fi", LABELS) is None
    with pytest.raises(EmonbError):
        load_teacher(ws.store.find("teacher", "mini-fi--vit"), LABELS[::-1])


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_a_picture_is_seen_upright_whatever_its_name_says():
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    image = read_picture(encoded(picture((96, 48)), "JPEG", exif=exif), "really-a-jpeg.png")
    assert image.size == (48, 96)
    assert image.mode == "RGB"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"no picture", "x.png: not a JPEG, PNG or WebP picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "x.png: not a JPEG, PNG or WebP picture"),
        (encoded(Image.new("RGB", (9, 9)), "GIF"), "x.png: not a JPEG, PNG or WebP picture"),
        (encoded(picture(), "PNG")[:150], "x.png: a damaged picture"),
        (b"", "x.png: not a JPEG, PNG or WebP picture"),
        (encoded(Image.new("1", (11_000, 11_000)), "PNG"), "x.png: 11000 x 11000 px; the limit is 100 megapixels"),
        (encoded(Image.new("1", (20_000, 20_000)), "PNG"), "x.png: more than 100 megapixels"),
    ],
)
def test_what_is_no_picture_is_one_message(data, message):
    with pytest.raises(UnreadablePicture, match=message):
        read_picture(data, "x.png")


def test_a_file_too_large_is_not_opened(monkeypatch):
    monkeypatch.setattr(room, "MAX_BYTES", 100)
    with pytest.raises(UnreadablePicture, match=r"x.png: .* MB; the limit is"):
        read_picture(encoded(picture(), "PNG"), "x.png")


def test_figure_marks_what_people_say(world):
    model, _ = world
    opinion = opinions(model, [picture()])[0]
    figure = opinions_figure(picture(), opinion, opinion.answers["head"])
    titles = [axes.get_title() for axes in figure.axes]
    assert titles[0] == f"people say: {opinion.answers['head']}"
    assert titles[2] == f"head\n{opinion.answers['head']} \u2713"
    assert "\u2717" in opinions_figure(picture(), opinion, "$hope").axes[2].get_title()
    unlabelled = opinions_figure(picture(), opinion)
    assert unlabelled.axes[2].get_title() == f"head\n{opinion.answers['head']}"
