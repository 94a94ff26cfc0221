"""Cost: parameters against sums by hand, models that take turns, a measurement that is kept. No absolute times."""

import time
from contextlib import contextmanager

import pytest
import torch
from pipeline import COLORS, make_tree, run_stages, tiny_workspace

from emonb import emotions, vlm
from emonb.cost import PICTURES, Model, cost_stage, cost_table, count, milliseconds
from emonb.distill import load_head
from emonb.emotions import Taxonomy
from emonb.gate import load_gate
from emonb.parameters import count_vlm
from emonb.store import STAGES, Store
from emonb.teacher import load_network


class Packed(torch.nn.Parameter):
    """A weight as bitsandbytes keeps it: two to a byte, the true shape beside it."""

    class State:
        shape = (6, 4)

    quant_state = State()


def test_count_takes_shared_weights_once_and_unpacks_four_bits():
    layer = torch.nn.Linear(3, 5)
    assert count([layer, torch.nn.Sequential(layer)]) == 20
    layer.weight = Packed(torch.zeros(12, 1, dtype=torch.uint8), requires_grad=False)
    assert count([layer]) == 24 + 5


def test_models_take_turns_and_the_warm_up_is_not_timed():
    seen, entered = [], []

    @contextmanager
    def within():
        entered.append(len(seen))
        yield

    def slow(path):
        seen.append(("slow", path))
        time.sleep(0.005)

    models = {"slow": Model(slow), "fast": Model(lambda p: seen.append(("fast", p)), within=within)}
    taken = milliseconds(models, ["a", "b", "c"], torch.device("cpu"), warm_up=1)
    assert seen == [(name, path) for path in "aabc" for name in ("slow", "fast")]
    assert len(entered) == 4
    assert {name: len(times) for name, times in taken.items()} == {"slow": 3, "fast": 3}
    assert taken["slow"].min() >= 5
    assert taken["fast"].min() > 0


@pytest.fixture(scope="module")
def world(tmp_path_factory, untrained_base):
    folder = tmp_path_factory.mktemp("cost")
    make_tree(folder / "images" / "colours", {"train": 4, "val": 2, "test": 6})
    patch = pytest.MonkeyPatch()
    patch.setattr(emotions, "TAXONOMIES", {"colours": Taxonomy("colours", tuple(COLORS))})
    ws = tiny_workspace(folder, untrained_base, folder / "images", "colours")
    yield ws, run_stages(ws, "colours"), vlm.load_vlm(ws.settings.vlm)
    patch.undo()


def test_stage_counts_what_is_needed_and_keeps_its_times(world):
    ws, made, base = world
    table = cost_table({"colours": cost_stage(ws.settings, ws.store, "colours", base)}).set_index("model")
    assert list(table.index) == ["vlm_zero_shot", "vlm_tuned", "head", "emovlmkd", "vit"]
    known = count_vlm(ws.settings.vlm.base, ws.settings.vlm.lora_r, ws.settings.vlm.lora_targets)
    head = count([load_head(made["head"], "head", 0)])
    gating = count([load_gate(made["gate"], "emovlmkd", 0)])
    vit = count([load_network(made["teacher"])[0]])
    tower = known["vision tower"] + known["merger"]
    whole = known["total"] + known["lora"]
    assert table["parameters"].tolist() == [known["total"], whole, tower + head, whole + head + gating, vit]
    assert table["trainable"].tolist() == [0, known["lora"], head, known["lora"] + head + gating, vit]
    assert (table["ms_low"] > 0).all()
    assert (table["ms_low"] <= table["ms_median"]).all()
    assert (table["ms_median"] <= table["ms_high"]).all()
    assert table["n"].unique().tolist() == [min(PICTURES, 18)]
    again = cost_table({"colours": cost_stage(ws.settings, ws.store, "colours", base)}).set_index("model")
    assert again.equals(table), "measured once, then kept"
    assert not hasattr(base.model, "peft_config"), "the base is as it was"


def test_a_network_that_failed_is_left_out_and_force_measures_anew(world):
    ws, _, base = world
    (ws.store.root / "teacher" / "colours--vit.json").unlink()
    first = cost_stage(ws.settings, ws.store, "colours", base)
    assert "vit" not in set(cost_table({"colours": first})["model"])
    before = first.digest
    forced = cost_stage(ws.settings, Store(ws.store.root, force=("cost",)), "colours", base)
    assert forced.path == first.path
    assert forced.digest != before, "times are never the same to the microsecond"
    assert STAGES["cost"] == "06_gate"
