"""Room 02: the files of paid answers survive what happens to files."""

from __future__ import annotations

import json

import pytest

from emonb.annotator import Answer, paid_triplets
from emonb.answer_log import AnswerLog, rejected_path
from emonb.emotions import TAXONOMIES
from emonb.errors import EmonbError
from emonb.offline import offline_triplets
from emonb.triplets import triplet_line

LABELS = TAXONOMIES["ekman6"].labels
USAGE = {"prompt_tokens": 100, "completion_tokens": 20}


def paid(image_id, usage=USAGE):
    row = {"image_id": image_id, "label": "fear", "sha256": "0" * 64}
    answer = Answer(conversation="A dark street.", reasoning="Nobody is near.", key_elements=[])
    origin = {"source": "openai", "model": "m-1", "created": None, "prompt_sha256": "p", "asked_of": "m",
              "answer_format": "schema"}  # fmt: skip
    return paid_triplets(row, LABELS, answer, origin, usage)


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "small.jsonl"
    with AnswerLog(path) as log:
        for name in ("a", "b", "c"):
            log.accept(paid(name))
        record = {"detail": "", "answer_format": "schema", "asked_of": "m", "prompt_sha256": "p", "usage": None}
        log.reject({**record, "image_id": "f", "reason": "not in the asked form"})
        log.reject({**record, "image_id": "g", "reason": "empty", "asked_of": "another"})
        log.reject({**record, "image_id": "d", "reason": "empty", "usage": USAGE})
        log.reject({"image_id": "e", "reason": "no answer", "detail": "500", "usage": None})
    return path


def test_what_was_written_is_there_again(path):
    heard = []
    with AnswerLog(path, ("m", "p"), heard.append) as log:
        assert log.done == {"a", "b", "c"}
        assert log.tries == {"d": 1, ("f", "schema"): 1}  # no answer is no try, and another model's is not ours
        assert log.last == {"d": "empty", "f": "not in the asked form"}
        assert log.form_failures == {"schema": 1}
        assert log.reasons == {"empty": 2, "no answer": 1, "not in the asked form": 1}
        assert log.origins == {("m", "p")}
        assert log.forms == {"schema": 3}
        assert log.usage == {("m", ""): {"answers": 4, "prompt_tokens": 400, "completion_tokens": 80}}
        assert log.repairs == []
    assert [group[0]["image_id"] for group in heard] == ["a", "b", "c"]


@pytest.mark.parametrize("cut", [1, 2, 40, 200])
def test_a_torn_last_line_costs_its_image_alone(path, cut):
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    with AnswerLog(path) as log:
        assert log.done == ({"a", "b", "c"} if cut == 1 else {"a", "b"})
        assert any("small.jsonl" in repair for repair in log.repairs)
        if cut > 1:
            log.accept(paid("c"))
    assert path.read_bytes() == whole
    with AnswerLog(path) as log:
        assert not log.repairs


def test_every_cut_of_the_file_leaves_whole_answers(path):
    whole = path.read_bytes()
    ends = [whole.index(b"\n", whole.index(b'"reasoning"', i)) for i in (0, len(whole) // 3, 2 * len(whole) // 3)]
    for cut in range(0, len(whole), 97):
        path.write_bytes(whole[:cut])
        with AnswerLog(path) as log:
            assert len(log.done) == sum(cut >= end for end in ends), cut


def test_zeros_after_a_power_cut_are_a_torn_line(path):
    path.write_bytes(path.read_bytes() + b"\0" * 4096)
    with AnswerLog(path) as log:
        assert log.done == {"a", "b", "c"}
        assert "torn last line of 4096 bytes" in log.repairs[0]


def test_a_torn_rejected_line_is_repaired_too(path):
    rejected = rejected_path(path)
    rejected.write_bytes(rejected.read_bytes()[:-5])
    with AnswerLog(path, ("m", "p")) as log:
        assert "small.rejected.jsonl" in log.repairs[0]
        assert log.tries == {"d": 1, ("f", "schema"): 1}


def test_damage_in_the_middle_is_named_not_guessed(path):
    lines = path.read_bytes().split(b"\n")
    lines[4] = lines[4][:20]
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(EmonbError, match=r"triplets/small.jsonl, line 5: not JSON; delete the line"):
        AnswerLog(path)
    with pytest.raises(EmonbError, match="line 5"):  # and the lock is free again
        AnswerLog(path)


def test_a_record_without_its_fields_is_named(path):
    rejected_path(path).write_text(json.dumps({"image_id": "a"}) + "\n")
    with pytest.raises(EmonbError, match=r"small.rejected.jsonl, line 1: field"):
        AnswerLog(path)


def test_two_writers_would_pay_twice(path):
    with AnswerLog(path), pytest.raises(EmonbError, match="another process is asking"):
        AnswerLog(path)


def test_offline_triplets_give_way(tmp_path):
    path = tmp_path / "small.jsonl"
    row = {"image_id": "a", "label": "fear", "sha256": "0" * 64, "brightness": 0.5, "colorfulness": 0.5, "scene": "x"}
    path.write_text("".join(map(triplet_line, offline_triplets(row, LABELS))))
    with AnswerLog(path) as log:
        assert not log.done
        assert not log.repairs
