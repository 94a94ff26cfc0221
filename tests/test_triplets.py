"""Room 02: the triplets file."""

from __future__ import annotations

import json

import pytest

from emonb.emotions import TAXONOMIES
from emonb.errors import EmonbError
from emonb.offline import offline_triplets
from emonb.triplets import read_triplets

ROW = {"image_id": "a.png", "sha256": "0" * 64, "brightness": 0.2, "colorfulness": 0.6, "label": "fear"}
LABELS = TAXONOMIES["mikels8"].labels


def write(path, rows):
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows))
    return path


def test_read_back_and_bad_lines(tmp_path):
    good = list(offline_triplets(ROW, LABELS))
    assert len(read_triplets(write(tmp_path / "t.jsonl", good))) == 3
    without = {k: v for k, v in good[1].items() if k != "response"}
    bad = {
        "line 2: not JSON": [good[0], '{"image_id": "b'],
        "line 2: field 'response' missing": [good[0], without],
        "field 'kind' is 'poem'": [{**good[0], "kind": "poem"}],
        "field 'response' is empty": [{**good[0], "response": " "}],
        "occurs twice": [good[0], good[0]],
    }
    for message, rows in bad.items():
        with pytest.raises(EmonbError) as caught:
            read_triplets(write(tmp_path / "bad.jsonl", rows))
        assert message in str(caught.value)
        assert "bad.jsonl" in str(caught.value)
