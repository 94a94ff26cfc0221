"""Room 02: what the triplets will cost, and how fast they may be asked for."""

from __future__ import annotations

import threading
import time

import pytest
import yaml

from emonb.errors import EmonbError
from emonb.pace import Pace
from emonb.prices import ImageRule, Price, estimate_table, image_tokens, load_prices
from emonb.settings import TripletSettings

TILES = ImageRule()
LABELS = ["positive", "negative"]


@pytest.mark.parametrize(
    ("size", "detail", "tokens"),
    [((1024, 1024), "high", 765), ((2048, 4096), "high", 1105), ((4096, 8192), "low", 85), ((96, 96), "high", 255)],
)
def test_tiles_as_in_the_provider_s_examples(size, detail, tokens):
    assert image_tokens(*size, TILES, detail, max_side=10_000) == tokens


@pytest.mark.parametrize(("size", "tokens"), [((1024, 1024), 1024), ((33, 32), 2), ((5000, 5000), 1536)])
def test_patches(size, tokens):
    assert image_tokens(*size, ImageRule(rule="patches"), "high", max_side=10_000) == tokens


def test_our_own_shrinking_comes_first():
    assert image_tokens(4000, 2000, TILES, "high", 512) == 85 + 170
    assert image_tokens(2000, 4000, ImageRule(rule="patches"), "high", 320) == 5 * 10


def test_the_shipped_prices_can_be_read_and_know_the_default_model():
    prices = load_prices(TripletSettings())
    assert prices.find(TripletSettings().model)
    assert prices.find("gpt-4.1-2025-04-14") == prices.find("gpt-4.1")
    assert prices.find("gpt-4.1-mini") != prices.find("gpt-4.1")
    assert prices.find("gpt-4.1-sonnet") is None
    assert str(prices.as_of).startswith("20")


def test_usd():
    price = Price(input=2, output=8, batch=0.5)
    assert price.usd(1_000_000, 500_000) == pytest.approx(6)
    assert price.usd(1_000_000, 500_000, batch=True) == pytest.approx(3)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("as_of: 2026-01-01\nmodels: {m: {input: -1, output: 1}}", "models.m.input"),
        ("as_of: 2026-01-01\nmodels: {m: {input: 1}}", "models.m.output"),
        ("as_of: 2026-01-01\nmodels: {m: {input: 1, output: 1, colour: 3}}", "models.m.colour"),
        ("models: [", "not valid YAML"),
    ],
)
def test_a_wrong_price_file_is_named_with_its_field(tmp_path, text, said):
    (tmp_path / "prices.yaml").write_text(text)
    with pytest.raises(EmonbError, match=said) as caught:
        load_prices(TripletSettings(prices=str(tmp_path / "prices.yaml")))
    assert "prices.yaml" in str(caught.value)
    with pytest.raises(EmonbError, match="cannot be read"):
        load_prices(TripletSettings(prices="nowhere.yaml"))


def test_an_estimate_adds_up(tmp_path):
    own = {"as_of": "2026-01-01", "models": {"m": {"input": 2.0, "output": 8.0, "batch": 0.5}}}
    (tmp_path / "prices.yaml").write_text(yaml.safe_dump(own))
    terms = TripletSettings(model="m", prices=str(tmp_path / "prices.yaml"), retries=1)
    table = estimate_table(terms, [(1024, 1024), (96, 96)], 1000, LABELS, batch=False).set_index("part")
    parts = table.drop(index="total")
    assert table.loc["input: picture", "tokens_low"] == 1000 * (765 + 255) / 2
    assert table.loc["input: picture", "tokens_worst"] == 2 * table.loc["input: picture", "tokens_high"]
    assert table.loc["input: picture", "tokens_high"] == table.loc["input: picture", "tokens_low"]
    assert (table.loc["total"] == parts.sum()).all()
    assert (parts["usd_low"] <= parts["usd_high"]).all()
    assert (parts["usd_high"] <= parts["usd_worst"]).all()
    output = parts.index[~parts.index.str.startswith("input")]
    assert table.loc[output, "tokens_worst"].sum() == 1000 * 2 * terms.max_output_tokens
    inputs = parts.index.str.startswith("input")
    assert parts["usd_low"].sum() == pytest.approx(
        (parts["tokens_low"][inputs].sum() * 2 + parts["tokens_low"][~inputs].sum() * 8) / 1e6
    )
    half = estimate_table(terms, [(1024, 1024), (96, 96)], 1000, LABELS, batch=True).set_index("part")
    assert half.loc["total", "usd_high"] == pytest.approx(table.loc["total", "usd_high"] / 2)


def test_an_unknown_price_still_gives_tokens():
    table = estimate_table(TripletSettings(model="my-server"), [(96, 96)], 10, LABELS, batch=False)
    assert table["tokens_high"].gt(0).sum() >= 5
    assert table["usd_high"].isna().all()


def send(pace, times, tokens, n):
    for _ in range(n):
        pace.wait(tokens, threading.Event())
        times.append(time.monotonic())


def most_within(times, window):
    return max(sum(t <= other < t + window for other in times) for t in times)


def test_never_more_requests_in_any_window():
    pace, times = Pace(5, None, window_s=0.3), []
    threads = [threading.Thread(target=send, args=(pace, times, 1, 4)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most_within(sorted(times), 0.28) <= 5
    assert 0.85 < max(times) - min(times) < 2.5  # 16 requests: four windows


def test_never_more_tokens_in_any_window_and_what_was_not_used_is_given_back():
    pace, times = Pace(None, 100, window_s=0.3), []
    send(pace, times, 50, 6)
    assert most_within(times, 0.28) <= 2
    pace, stop = Pace(None, 100, window_s=30), threading.Event()
    start = time.monotonic()
    for _ in range(10):
        pace.settle(pace.wait(50, stop), 5)  # 10 x 5 used of 100
    assert time.monotonic() - start < 1
    threading.Timer(0.2, stop.set).start()
    assert pace.wait(60, stop) is None  # 50 + 60 are too many


def test_a_pause_holds_for_all_and_stop_ends_the_waiting():
    pace, stop = Pace(None, None), threading.Event()
    pace.pause(0.3)
    start = time.monotonic()
    assert pace.wait(1, stop)
    assert time.monotonic() - start >= 0.29
    pace.pause(60)
    threading.Timer(0.1, stop.set).start()
    start = time.monotonic()
    assert pace.wait(1, stop) is None
    assert time.monotonic() - start < 2
