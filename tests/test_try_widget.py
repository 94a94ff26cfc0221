"""The controls of notebook 09 without a browser: bytes in, escaped answer out."""

from __future__ import annotations

import datetime
import io
import re

import pytest
from assembled import LABELS, assembled, picture, results
from exploring import HOSTILE

from emonb import try_widget
from emonb.opinions import Opinion, opinions
from emonb.try_widget import SENTENCE, TryImage, opinion_html, try_image


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    model = assembled()
    return model, results(tmp_path_factory.mktemp("widget"), model)


def upload(controls, name, data):
    """What the browser sends when a file is chosen."""
    now = datetime.datetime.now(tz=datetime.UTC)
    file = {"name": name, "type": "image/png", "size": len(data), "content": memoryview(data), "last_modified": now}
    controls.upload.value = ({**file},)
    return controls.answer.value


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def test_a_file_of_ones_own_is_answered_and_its_name_is_text(world):
    model, ws = world
    answer = upload(TryImage(ws), HOSTILE, png(picture()))
    expected = opinions(model, [picture()], texts=True)[0]
    assert f"&lt;img src=x onerror=alert(1)&gt;.png: {expected.emotion}" in answer
    assert expected.reasons in answer
    assert set(re.findall(r"<(\w+)", answer)) == {"p", "b", "img"}
    assert len(re.findall("<img ", answer)) == 3


def test_what_the_vlm_writes_is_text(world):
    model, _ = world
    said = opinions(model, [picture()], texts=True)[0]
    hostile = Opinion(**{**vars(said), "reasons": "<script>alert(2)</script>", "key_elements": "\x1b$x$ &amp;"})
    html = opinion_html(picture(), hostile, "<b>hope</b>")
    assert "<script" not in html
    assert "&lt;script&gt;alert(2)&lt;/script&gt;" in html
    assert "\\x1b$x$ &amp;amp;" in html


@pytest.mark.parametrize("data", [b"no picture", b"", png(picture())[:120]])
def test_a_bad_file_is_one_message(world, data):
    answer = upload(TryImage(world[1]), HOSTILE, data)
    assert re.fullmatch(r"<p><b>&lt;img src=x onerror=alert\(1\)&gt;\.png: (not|a damaged) [^<>]+</b></p>", answer)


def test_samples_and_other_faults(world, monkeypatch):
    _, ws = world
    controls = TryImage(ws)
    options = dict(controls.sample.options)
    assert list(options) == ["", *(f"{label}: {i}.png" for i, label in enumerate(LABELS[:3]))]
    controls.sample.value = options["anger: 1.png"]
    assert "1.png: " in controls.answer.value
    upload(controls, "own.png", png(picture()))
    assert controls.sample.value == ""
    assert "own.png: " in controls.answer.value
    controls.sample.value = options["anger: 1.png"]
    assert controls.upload.value == ()

    def fails(*args, **kwargs):
        raise RuntimeError("<i>out of memory</i>")

    monkeypatch.setattr(try_widget, "opinions", fails)
    assert "(RuntimeError: &lt;i&gt;out of memory" in upload(controls, "a.png", png(picture()))


def test_a_missing_model_is_said_in_the_controls(world, tmp_path):
    _, ws = world
    controls = TryImage(ws)
    controls._ws = type(ws)(ws.settings, ws.store, tmp_path)
    assert "holds no EmoVLM-KD" in upload(controls, "a.png", png(picture()))


def test_headless_prints_one_sentence(world, monkeypatch, capsys):
    monkeypatch.setenv("EMONB_HEADLESS", "1")
    assert try_image(world[1]) is None
    assert capsys.readouterr().out == SENTENCE + "\n"
