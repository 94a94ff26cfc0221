"""Figures: every label, number of images and of seeds is in the picture; areas and bars are the counts."""

import sys

import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from synthetic import synthetic

from emonb import complementarity as co
from emonb import figures, tables
from emonb.emotions import TAXONOMIES
from emonb.settings import load_settings

DATASETS = ("mini-fi", "mini-emotion6", "mini-flickr")


@pytest.fixture(scope="module")
def settings():
    return load_settings("smoke")


@pytest.fixture(scope="module")
def predictions():
    return synthetic(DATASETS, n=120)


def words(fig):
    """All visible text of a figure, tick labels included: those exist only once it is drawn."""
    FigureCanvasAgg(fig).draw()
    return "\n".join(t.get_text() for t in fig.findobj(Text) if t.get_visible())


def test_confusion_shows_all_labels_counts_and_basis(predictions):
    frame = predictions["mini-fi", "emovlmkd"]
    fig = figures.confusion(frame, "EmoVLM-KD on mini-fi (drawn)")
    text = words(fig)
    assert all(text.count(label) >= 2 for label in TAXONOMIES["mikels8"].labels)
    assert "n = 120 images, 3 seeds" in text
    mesh = fig.axes[0].collections[0].get_array().reshape(8, 8)
    assert np.allclose(mesh.sum(axis=1), 100)
    awe = frame[frame["label"] == "awe"]
    assert mesh[2, 2] == pytest.approx(100 * (awe["prediction"] == "awe").mean())
    labels = [t.get_text() for t in fig.axes[0].get_yticklabels()]
    assert tuple(labels) == TAXONOMIES["mikels8"].labels


def test_confusion_gives_unparsable_answers_a_column_and_takes_an_ax(predictions):
    from matplotlib.figure import Figure

    ax = Figure().subplots()
    fig = figures.confusion(predictions["mini-fi", "vlm_generated"], "generated", ax=ax)
    assert fig is ax.figure
    assert [t.get_text() for t in ax.get_xticklabels()][-1] == "(unparsable)"
    assert "1 seed" in ax.get_title()
    assert "seeds" not in ax.get_title()


@pytest.mark.parametrize("overlap", [0.0, 1.0, 5.0, 11.0])
def test_circles_share_the_area_they_should(overlap):
    r1, r2 = 2.0, 2.5
    d = co.circle_distance(r1, r2, overlap)
    points = np.random.default_rng(0).uniform([-2.5, -2.5], [7.5, 2.5], size=(400_000, 2))
    inside = (np.hypot(*points.T) < r1) & (np.hypot(points[:, 0] - d, points[:, 1]) < r2)
    assert 50 * inside.mean() == pytest.approx(overlap, abs=0.12)
    assert co.circle_distance(r1, r2, np.pi * r1**2) == pytest.approx(r2 - r1)


def test_venn_and_bars_show_the_counts(predictions, settings):
    table = co.complementarity_table(predictions, settings)
    overall, single = table[table["emotion"] == "all"], table[table["emotion"] != "all"]
    text = words(figures.complementarity_venn(overall))
    for row in overall.to_dict("records"):
        assert row["dataset"] in text
        assert f"only VLM\n{row['only_VLM_right']}\n" in text
        assert f"neither: {row['neither_right']} " in text
    fig = figures.complementarity_by_emotion(single)
    text = words(fig)
    assert all(f"{e} ({n})" in text for e, n in zip(single["emotion"], single["n"], strict=True))
    assert text.count("n = 120 images, 1 seed") == 3
    widths = [bar.get_width() for bar in fig.axes[0].patches]
    assert sum(widths) == pytest.approx(800)  # eight emotions of 100 %


def test_agreement_alpha_and_depth_name_every_dataset_and_basis(predictions, settings):
    joint = {d: co.joint(predictions, d) for d in DATASETS}
    agreement = figures.agreement({d: co.agreement_matrix(t) for d, t in joint.items()}, dict.fromkeys(DATASETS, 120))
    alpha, depth = (f(predictions, settings) for f in (tables.alpha, tables.depth))
    for fig, seeds in (
        (agreement, "1 seed"), (figures.alpha_tradeoff(alpha), "3 seeds"), (figures.depth(depth), "3 seeds"),
    ):  # fmt: skip
        text = words(fig)
        assert all(d in text for d in DATASETS)
        assert text.count(f"n = 120 images, {seeds}") == 3
        if fig is agreement:
            assert "EmoVLM-KD" in text
    assert [t.get_text() for t in figures.alpha_tradeoff(alpha).axes[0].texts] == ["0", "0.25", "0.5", "0.75", "1"]


def test_examples_show_pictures_truth_and_answers(predictions):
    examples = co.select_examples(co.joint(predictions, "mini-fi"), 2)
    pictures = [np.full((8, 8, 3), i, np.uint8) for i in range(len(examples))]
    fig = figures.qualitative_examples(examples, pictures, "mini-fi (drawn)", 120)
    shown = [image.get_array()[0, 0, 0] for ax in fig.axes for image in ax.images]
    assert shown == list(range(len(examples)))
    text = words(fig)
    assert "mini-fi (drawn)" in text
    assert "n = 120 images" in text
    assert text.count("✓") == len(examples)
    empty = figures.qualitative_examples(examples.iloc[:0], [], "none", 0)
    assert words(empty).count("no such image") == 3


def test_training_curves_average_seeds():
    rows = [
        {"stage": s, "dataset": d, "epoch": e, "split": p, "metric": "loss", "value": e + k, "seed": k}
        for s in ("head", "gate") for d in DATASETS for e in (1, 2, 3) for p in ("train", "val") for k in (0, 2)
    ]  # fmt: skip
    fig = figures.training_curves(pd.DataFrame(rows))
    assert "head: 2 seeds" in words(fig)
    assert fig.axes[0].lines[0].get_ydata().tolist() == [2, 3, 4]
    assert all(d in words(fig) for d in DATASETS)


def test_small_images_with_alt_text_and_no_pyplot_state(predictions):
    fig = figures.confusion(predictions["mini-flickr", "vit"], "x")
    png, jpeg = figures.as_image(fig, "a matrix"), figures.as_image(fig, "a matrix", photo=True)
    assert png.data[:4] == b"\x89PNG"
    assert jpeg.data[:2] == b"\xff\xd8"
    assert png.alt == "a matrix"
    assert len(png.data) < 60_000
    assert not sys.modules["matplotlib.pyplot"].get_fignums()
