"""A served model as one more row: asked once about each picture, on the annotator's terms; beside ours in tables."""

from __future__ import annotations

import json
import random

import numpy as np
import pandas as pd
import pytest
from annotating import EMOTIONS, asked_of, completion, make_samples
from exploring import world
from synthetic import synthetic
from test_explorer import data_of

from emonb import headless, tables
from emonb.annotate import ask_emotions, price_of_asking
from emonb.data import question
from emonb.errors import EmonbError, StoppedEarly
from emonb.predictions import asked_of_all, strangers
from emonb.run import open_run
from emonb.settings import TripletSettings, load_settings
from emonb.show.explorer import explorer_html

USD = (100 * 2 + 50 * 8) / 1e6  # of an answer, by gpt-4.1


def guess(n, request):
    """A model that names an emotion of those it is offered, and talks of something else every fifth time."""
    offered = request["messages"][1]["content"][1]["text"].split("one of: ")[1].split(".")[0].split(", ")
    return completion("A quiet street." if n % 5 == 0 else f"{{'emotion': '{random.Random(n).choice(offered)}'}}")


class Served:
    """A dataset `small` of 24 test pictures, and its log."""

    def __init__(self, folder):
        self.samples = make_samples(folder, 22).assign(split="test")
        self.path = folder / "out" / "asked" / "small__m.jsonl"

    def ask(self, images=0, **terms):
        settings = TripletSettings(**{"timeout_s": 2, **terms})
        return ask_emotions(self.samples, EMOTIONS, self.path, settings, images=images, say=lambda line: None)


@pytest.fixture
def served(tmp_path):
    return Served(tmp_path)


def test_each_image_is_asked_once_what_our_vlm_is_asked(served, monkeypatch):
    requests = []
    with asked_of(monkeypatch, answer=lambda n, request: requests.append(request) or guess(n, request)) as server:
        frame, stopped = served.ask()
        assert (stopped, server.paid, len(frame)) == ("", 24, 24)
        assert all(row["media_ok"] for row in server.log)
        again, _ = served.ask()
        assert server.paid == 24, "what is in the log is not asked for again"
        pd.testing.assert_frame_equal(again, frame)
    assert {r["messages"][1]["content"][1]["text"] for r in requests} == {question(EMOTIONS)}
    assert {r["messages"][0]["content"] for r in requests} == {"You are a visual assistant that sees one image."}
    assert (~frame["parsed"]).sum() == 4, "every fifth answer; it stays unparsed, and is not asked for again"
    assert set(frame.loc[~frame["parsed"], "prediction"]) == {""}
    assert set(frame.loc[~frame["parsed"], "raw_text"]) == {"A quiet street."}
    for row in frame[frame["parsed"]].itertuples():
        assert row.prediction in row.raw_text
    price = price_of_asking(served.path)
    assert price["usd"] == pytest.approx(24 * USD)
    assert 0 < price["seconds"] < 2


def test_other_pictures_labels_and_models_are_other_questions(served, monkeypatch):
    with asked_of(monkeypatch, answer=guess) as server:
        served.ask()
        served.samples.loc[0, "sha256"] = "drawn anew"
        served.ask()
        assert server.paid == 25
        settings = TripletSettings()
        ask_emotions(served.samples, EMOTIONS[::-1], served.path, settings, say=lambda line: None)
        assert server.paid == 49
        served.ask(model="gpt-4o")
        assert server.paid == 73


def test_a_part_is_the_same_part_of_every_larger_one(served, monkeypatch):
    with asked_of(monkeypatch, answer=guess) as server:
        few, _ = served.ask(images=6)
        more, _ = served.ask(images=12)
        same, _ = served.ask(images=6)
        pd.testing.assert_frame_equal(same, more)  # what is there counts
        assert (len(few), len(more), server.paid) == (6, 12, 12)
        assert set(few["image_id"]) < set(more["image_id"])
        assert set(few["image_id"]) != set(served.samples["image_id"][:6]), "not the first, which are of one kind"


def test_the_limit_on_the_cost_is_kept_and_nothing_is_paid_twice(served, monkeypatch):
    with asked_of(monkeypatch, answer=guess) as server:
        frame, stopped = served.ask(max_cost=0.015, concurrency=2)
        assert "raise --max-cost" in stopped
        assert 0 < len(frame) == server.paid < 24
        assert server.paid * USD < 0.015
        with served.path.open("ab") as file:
            file.write(b'{"image_id": "half a li')  # as a kill leaves it
        part, _ = served.ask(max_cost=0.015)
        assert len(part) == len(frame) == server.paid
        assert len(served.ask(max_cost=5.0)[0]) == server.paid == 24


def test_a_model_that_names_no_emotion_is_ended_and_one_that_names_some_may_fail_often(served, monkeypatch):
    named = []
    with asked_of(monkeypatch, answer=lambda n, _: completion(named.pop() if named else "A street.")) as server:
        frame, stopped = served.ask(concurrency=1)
        assert "8 answers in a row were unparsable" in stopped
        assert (len(frame), frame["parsed"].any()) == (server.paid, False) == (8, False)
        named.append("joy")
        frame, stopped = served.ask(concurrency=1)
        assert (stopped, server.paid, frame["parsed"].sum()) == ("", 24, 1)


def test_a_label_in_an_answer_that_is_cut_off_counts_and_one_in_a_refusal_does_not(served, monkeypatch):
    cut = {"finish_reason": "length", "message": {"role": "assistant", "content": "{'emotion': 'joy'} because the"}}
    refused = "I'm sorry, but I can't identify joy in this."
    with asked_of(monkeypatch, answer=lambda n, r: completion("", choices=[cut]) if n % 2 else completion(refused)):
        frame, _ = served.ask(concurrency=1)
    assert frame["prediction"].value_counts().to_dict() == {"joy": 12, "": 12}


def test_an_unknown_price_is_said_before_anything_is_sent(served, monkeypatch):
    with asked_of(monkeypatch, answer=guess) as server:
        with pytest.raises(EmonbError, match=r"the price of m, or .* is unknown.*--no-price"):
            served.ask(model="m")
        assert server.log == []
        assert len(served.ask(model="m", price="none")[0]) == 24
    assert np.isnan(price_of_asking(served.path)["usd"])


def test_a_damaged_line_is_named(served, monkeypatch):
    with asked_of(monkeypatch, answer=guess) as server:
        served.ask(images=3)
        served.path.write_text(served.path.read_text().replace('"emotion":', '"motion":', 1))
        with pytest.raises(EmonbError, match=r"asked/small__m\.jsonl, line 1: .*emotion.* missing; delete"):
            served.ask()
        assert server.paid == 3


# ---- a run ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def running(tmp_path, notebook_folder, monkeypatch):
    """A run of two datasets with one notebook, which reads all predictions; called with what is asked for."""
    monkeypatch.setattr(headless, "write_report", lambda out: (out / "index.html").touch())
    source = notebook_folder("reads_result") / "01_reads_result.ipynb"
    notebook = json.loads(source.read_text())
    notebook["cells"] = notebook["cells"][:3] + notebook["cells"][-1:]
    notebook["cells"][-1]["source"] = [
        "from contextlib import suppress\n",
        "from emonb.errors import EmonbError\n",
        "from emonb.run import open_run\n",
        "with suppress(EmonbError):  # there are none\n",
        "    open_run(profile, datasets, out, **more).all_predictions()",
    ]
    source.write_text(json.dumps(notebook))

    def call(model="", images=4, **terms):
        ask = {"model": model, "timeout_s": 2, **terms} if model else None
        given = {"datasets": "mini-fi,mini-flickr", "out": str(tmp_path / "out"), "folder": source.parent}
        headless.run("smoke", **given, ask=ask, ask_images=images)

    call.out = tmp_path / "out"
    call.status = lambda: json.loads((call.out / "run.json").read_text())["notebooks"]["01_reads_result"]["status"]
    return call


def test_a_run_asks_first_and_notebooks_see_the_new_rows(running, monkeypatch):
    running()
    running()
    assert running.status() == "up to date"
    with asked_of(monkeypatch, answer=guess) as server:
        running("org/some model", price="none")
        assert (server.paid, running.status()) == (8, "executed"), "a file that came makes what read the folder stale"
        running("org/some model", price="none")
        assert (server.paid, running.status()) == (8, "up to date")
        running("vit", price="none")
    names = {path.name for path in (running.out / "predictions").iterdir()}
    datasets, models = ("mini-fi", "mini-flickr"), ("org-some-model", "served-vit")
    assert names == {f"{dataset}__{model}.parquet" for dataset in datasets for model in models}
    run = open_run("smoke", ",".join(datasets), str(running.out))
    assert set(run.asked()) == {(dataset, model) for dataset in datasets for model in models}


def test_a_run_that_stops_early_keeps_its_answers_and_says_so(running, monkeypatch):
    with asked_of(monkeypatch, answer=guess) as server:
        with pytest.raises(StoppedEarly, match=r"mini-fi: .*raise --max-cost.*; mini-flickr: .*Without --ask") as end:
            running("gpt-4.1", images=0, max_cost=0.01)
        assert end.value.exit_code == 3
        assert not (running.out / "notebooks").exists()
        counts = {path.name: len(pd.read_parquet(path)) for path in (running.out / "predictions").iterdir()}
        assert sum(counts.values()) == server.paid
        assert min(counts.values()) > 1
        running()
        assert running.status() == "executed"


def test_somebody_else_s_predictions_are_not_overwritten(running, monkeypatch):
    theirs = running.out / "predictions" / "mini-fi__gpt-4.1.parquet"
    running()
    theirs.parent.mkdir()
    theirs.write_bytes(b"theirs")
    with asked_of(monkeypatch, answer=guess) as server:
        with pytest.raises(EmonbError, match=r"mini-fi__gpt-4\.1\.parquet: somebody else's; move it away"):
            running("gpt-4.1")
        assert (server.log, theirs.read_bytes()) == ([], b"theirs")


# ---- beside ours ---------------------------------------------------------------------------------------------------


def part_of(frame, n, one_hot=False):
    """The answers about every third image, n of them; as a model gives them that says a word."""
    part = frame[frame["seed"] == 0].iloc[::3].iloc[:n].copy()
    columns = [column for column in part if column.startswith("p_")]
    if one_hot:
        part[columns] = [[float(column == f"p_{name}") for column in columns] for name in part["prediction"]]
    return part.reset_index(drop=True)


def test_a_part_of_the_images_is_compared_on_these_alone():
    settings, ours = load_settings("smoke"), synthetic()
    some = part_of(ours["mini-fi", "vit"], 30)
    predictions = {**ours, ("mini-fi", "some"): some, ("mini-fi", "one"): some[:1]}
    assert strangers(predictions, "mini-fi") == ["some"], "one image has no interval"
    main, modules = tables.main(predictions, settings), tables.modules(predictions, settings)
    row = modules.set_index("row").loc["some"]
    assert (row["n"], row["name"]) == (30, "some (part of the images)")
    same = {key: frame[frame["image_id"].isin(some["image_id"])] for key, frame in ours.items()}
    same["mini-fi", "average_vlm_head"] = same["mini-fi", "vit"]  # all saw 30 images
    alike = tables.gates(same, settings).query("dataset == 'mini-fi (drawn)'").set_index("row").loc["average_vlm_head"]
    assert row["gain"] == pytest.approx(alike["gain"])
    for table in (main, modules):
        assert "so compare by the gain: some (30 of 120)" in table.attrs["caption"]
        assert "one (" not in table.attrs["caption"]
    fi = main[main["dataset"] == "mini-fi (drawn)"]
    assert fi["chance"].nunique() == 1, "of the dataset, not of the images that a model happens to have seen"


def test_images_that_are_not_ours_do_not_count():
    settings, ours = load_settings("smoke"), synthetic()
    vit = ours["mini-fi", "vit"]
    other = vit.assign(image_id="other/" + vit["image_id"], prediction=vit["label"])
    predictions = {**ours, ("mini-fi", "theirs"): pd.concat([vit, other])}
    rows = tables.main(predictions, settings).query("dataset == 'mini-fi (drawn)'").set_index("row")
    assert rows.loc["theirs", ["ours", "n"]].tolist() == rows.loc["vit", ["ours", "n"]].tolist()
    assert len(asked_of_all(predictions, "mini-fi")) == 120


def test_the_table_of_asked_models_by_hand():
    settings, ours = load_settings("smoke"), synthetic()
    some = part_of(ours["mini-fi", "vit"], 30, one_hot=True)
    columns = [column for column in some if column.startswith("p_")]
    some.loc[:5, ["prediction", "parsed"]] = "", False
    some.loc[:5, columns] = 1 / len(columns)
    predictions, price = {**ours, ("mini-fi", "some"): some}, {"usd": 0.5, "seconds": 1.5}
    table = tables.asked(predictions, settings, {("mini-fi", "some"): price, ("mini-flickr", "gone"): price})
    assert table[["dataset", "model", "n"]].to_numpy().tolist() == [["mini-fi (drawn)", "some", 30]]
    row = table.iloc[0]
    assert row["accuracy"] == pytest.approx(100 * (some["prediction"] == some["label"]).mean())
    assert row["unparsable"] == pytest.approx(20)
    assert (row["usd"], row["seconds"]) == (0.5, 1.5)
    best = ours["mini-fi", "emovlmkd"]
    best = best[best["image_id"].isin(some["image_id"])]
    lead = row["accuracy"] - 100 * (best["prediction"] == best["label"]).mean()
    assert row["gain"] == pytest.approx(lead)
    assert row["gain_low"] < lead < row["gain_high"]
    assert "some (30 of 120)" in table.attrs["caption"]
    nobody = tables.asked(ours, settings, {})
    assert nobody.empty
    assert "usd" in tables.latex_text(nobody, "served_models")


def test_the_explorer_shows_what_it_was_asked_and_no_surety_of_a_word(tmp_path):
    predictions = world(tmp_path, ("mini-fi",), n=24)
    whole = data_of(explorer_html(predictions))["sets"][0]
    some = predictions["mini-fi", "some"] = part_of(predictions["mini-fi", "vit"], 8, one_hot=True)
    found = data_of(explorer_html(predictions))["sets"][0]
    at = found["models"].index("some")
    assert len(found["id"]) == 24
    answers = dict(zip(found["id"], found["answer"][at], strict=True))
    assert {name for name, code in answers.items() if code >= "0"} == set(some["image_id"]), "-1 is before 0"
    assert set(found["sure"][at]) == {chr(ord("0") - 1)}
    for kind in ("id", "mask", "filters"):
        assert found[kind] == whole[kind], "ours are shown as before"
    assert [one for i, one in enumerate(found["answer"]) if i != at] == whole["answer"]
