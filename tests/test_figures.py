"""Figures: the numbers drawn are those of plain pandas; labels, images and seeds are in the picture."""

import inspect
import itertools
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.text import Text
from PIL import Image
from synthetic import frame_of, synthetic

from emonb import figures, tables
from emonb.data import TAXONOMIES
from emonb.metrics import agreement_matrix, reliability
from emonb.predictions import MAIN, QUARTET, first_seed, joint, model_color, select_examples
from emonb.settings import load_settings

DATASETS = ("mini-fi", "mini-emotion6", "mini-flickr")
LABELS = TAXONOMIES["mikels8"].labels


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


def cost_of(datasets=("mini-fi (drawn)",)):
    """A made-up table `cost`."""
    rows = [
        {"dataset": d, "model": m, "name": m, "parameters": 10**k, "trainable": 1, "ms_median": 2.0 * k,
         "ms_low": 1.5 * k, "ms_high": 4.0 * k, "n": 16, "device": "cpu"}
        for d in datasets for k, m in enumerate(QUARTET, 5)
    ]  # fmt: skip
    return pd.DataFrame(rows)


def notes_of(ax):
    return {t.get_position(): t.get_text() for t in ax.texts if t.get_text()}


def test_confusion_shows_all_labels_counts_and_basis(predictions):
    frame = predictions["mini-fi", "emovlmkd"]
    fig = figures.confusion(frame, "EmoVLM-KD on mini-fi (drawn)")
    text = words(fig)
    assert all(text.count(label) >= 2 for label in LABELS)
    assert "n = 120 images, 3 seeds" in text
    mesh = fig.axes[0].collections[0].get_array().reshape(8, 8)
    assert np.allclose(mesh.sum(axis=1), 100)
    awe = frame[frame["label"] == "awe"]
    hits = (awe["prediction"] == "awe").sum()
    assert mesh[2, 2] == pytest.approx(100 * hits / len(awe))
    assert tuple(t.get_text() for t in fig.axes[0].get_yticklabels()) == LABELS
    assert notes_of(fig.axes[0])[2.5, 2.5] == f"{100 * hits / len(awe):.0f} %\n{hits}"
    free = figures.confusion(predictions["mini-fi", "vlm_generated"], "generated").axes[0]
    assert [t.get_text() for t in free.get_xticklabels()][-1] == "(unparsable)"
    assert free.get_title().endswith("1 seed")


def test_difference_is_in_points_on_common_images(predictions):
    a, b = predictions["mini-fi", "emovlmkd"], predictions["mini-fi", "vlm_tuned"].iloc[:96]
    ax = figures.confusion_difference(a, b, "a minus b").axes[0]
    want = [
        pd.crosstab(f["label"], f["prediction"], normalize="index").reindex(index=LABELS, columns=LABELS, fill_value=0)
        for f in (a[a["image_id"].isin(b["image_id"])], b)
    ]
    want = 100 * (want[0] - want[1]).to_numpy()
    mesh = ax.collections[0]
    assert np.allclose(mesh.get_array().reshape(8, 8), want)
    low, high = mesh.get_clim()
    assert low == -high == -np.abs(want).max(), "zero is the colour in the middle"
    shown = {(c + 0.5, r + 0.5): f"{want[r, c]:+.0f}" for r, c in np.ndindex(8, 8) if want[r, c].round() != 0}
    assert notes_of(ax) == shown
    assert "n = 96 images, 3 and 1 seeds" in ax.get_title()
    free = figures.confusion_difference(predictions["mini-fi", "vlm_generated"], predictions["mini-fi", "vit"], "x")
    assert [t.get_text() for t in free.axes[0].get_xticklabels()] == [*LABELS, "(unparsable)"]


def test_overview_has_a_panel_for_each_matrix(predictions):
    chosen = {d: {m: first_seed(predictions[d, m]) for m in QUARTET} for d in DATASETS[::2]}
    fig = figures.confusion_overview(chosen)
    assert len(fig.axes) == 8
    table = joint(predictions, "mini-fi", QUARTET)
    shares = pd.crosstab(table["label"], table["emovlmkd"], normalize="index")
    assert np.allclose(fig.axes[3].collections[0].get_array().reshape(8, 8), 100 * shares)
    assert fig.axes[3].get_title() == "EmoVLM-KD"
    assert "mini-fi\nn = 120 images, 1 seed\ntrue" in words(fig)


def test_circles_and_bars_show_the_counts(predictions, settings):
    table = tables.complementarity(predictions, settings)
    overall, single = table[table["emotion"] == "all"], table[table["emotion"] != "all"]
    venn = figures.complementarity_venn(overall)
    for ax, row in zip(venn.axes, overall.to_dict("records"), strict=True):
        text = "\n".join(notes_of(ax).values())
        assert row["dataset"] in ax.get_title()
        assert f"only VLM\n{row['only_VLM_right']}\n" in text
        assert f"neither: {row['neither_right']} " in text
        vlm, vit = (circle.radius**2 for circle in ax.patches)
        counts = [row["both_right"] + row[f"only_{m}_right"] for m in ("VLM", "ViT")]
        assert vlm / vit == pytest.approx(counts[0] / counts[1])
    fig = figures.complementarity_by_emotion(single)
    text = words(fig)
    assert all(f"{e} ({n})" in text for e, n in zip(single["emotion"], single["n"], strict=True))
    assert text.count("n = 120 images, 1 seed") == 3
    widths = [bar.get_width() for bar in fig.axes[0].patches]
    assert sum(widths) == pytest.approx(800)  # eight emotions of 100 %
    first = single[single["dataset"] == "mini-fi (drawn)"]
    assert widths[:8] == pytest.approx((100 * first["both_right"] / first["n"]).tolist())


@pytest.mark.parametrize("counts", [(0, 0, 0, 9), (4, 0, 5, 0), (0, 6, 3, 0), (9, 0, 0, 0), (1, 40, 7, 0)])
def test_circles_of_odd_counts_keep_their_texts_apart(settings, counts):
    names = ["both_right", "only_VLM_right", "only_ViT_right", "neither_right"]
    table = pd.DataFrame([{"dataset": "d", "n": sum(counts), **dict(zip(names, counts, strict=True))}])
    fig = figures.complementarity_venn(table)
    canvas = FigureCanvasAgg(fig)
    canvas.draw()
    boxes = [text.get_window_extent(canvas.get_renderer()) for text in [*fig.axes[0].texts, fig.axes[0].title]]
    assert not [1 for a, b in itertools.combinations(boxes, 2) if a.overlaps(b)]


def test_upset_bars_and_dots_are_the_intersections(predictions):
    answers = {d: joint(predictions, d) for d in DATASETS}
    *axes, dots = figures.complementarity_upset(answers).axes
    rows = [m.get_text() for m in dots.get_yticklabels()]
    assert rows == ["VLM, tuned", "ViT (teacher)", "distilled head", "EmoVLM-KD"]
    filled = {tuple(np.round(xy).astype(int)) for xy in dots.collections[-1].get_offsets()}
    for ax, table in zip(axes, answers.values(), strict=True):
        hits = table[list(QUARTET)].eq(table["label"], axis=0)
        for column, bar in enumerate(ax.patches):
            combination = [(column, k) in filled for k in range(4)]
            n = (hits == combination).all(axis=1).sum()
            assert bar.get_height() == pytest.approx(100 * n / 120)
            assert ax.texts[column].get_text() == str(n)
            assert (to_hex(bar.get_facecolor()).upper() == model_color("emovlmkd")) == combination[3]
        assert sum(int(t.get_text()) for t in ax.texts) == 120


def test_agreement_alpha_and_depth_name_every_dataset_and_basis(predictions, settings):
    kappas = {d: agreement_matrix(joint(predictions, d)) for d in DATASETS}
    agreement = figures.agreement(kappas, dict.fromkeys(DATASETS, 120))
    alpha, depth = figures.alpha_tradeoff(tables.alpha(predictions, settings)), tables.depth(predictions, settings)
    for fig, seeds in ((agreement, "1 seed"), (alpha, "3 seeds"), (figures.depth(depth), "3 seeds")):
        text = words(fig)
        assert all(d in text for d in DATASETS)
        assert text.count(f"n = 120 images, {seeds}") == 3
    kappa = kappas["mini-fi"].loc["vlm_tuned", "vlm_zero_shot"]
    assert notes_of(agreement.axes[0])[0.5, 0.5] == f"{kappa:.2f}".replace("0.", ".")
    assert [t.get_text() for t in alpha.axes[0].texts] == ["0", "0.25", "0.5", "0.75", "1"]


def test_gate_weights_are_the_two_halves_and_their_lift():
    half = np.array([[3.0, 1.0, 0.0], [0.0, 2.0, 0.0], [1.0, -1.0, 5.0]])
    assert figures.lift(half).tolist() == [2.5, 2.0, 5.0]
    assert np.allclose(figures.lift(half + np.array([10, -4, 7])), figures.lift(half)), "what a softmax ignores"
    rng = np.random.default_rng(0)
    weights = {"a": (LABELS, rng.normal(size=(8, 16))), "b": (("positive", "negative"), rng.normal(size=(2, 4)))}
    fig = figures.gate_weights(weights)
    meshes = [ax.collections[0].get_array() for ax in fig.axes if ax.collections and not ax.patches]
    want = [half for _, w in weights.values() for half in np.split(w, 2, axis=1)]
    assert all(any(np.size(m) == w.size and np.allclose(np.ravel(m), np.ravel(w)) for m in meshes) for w in want)
    bars = [[p.get_width() for p in ax.patches] for ax in fig.axes if ax.patches]
    for drawn, (_, w) in zip(bars, weights.values(), strict=True):
        assert drawn == pytest.approx([*figures.lift(w[:, : len(w)]), *figures.lift(w[:, len(w) :])])
    assert words(fig).count("amusement") == 4, "rows once, columns twice, bars once"


def test_gate_trust_draws_its_table(predictions):
    table = tables.gate_trust(predictions, DATASETS)
    shown = table[table["dataset"] == "mini-fi (drawn)"]
    ax = figures.gate_trust(table).axes[0]
    assert [p.get_width() for p in ax.patches[: len(shown)]] == pytest.approx(shown["followed_vlm"].tolist())
    ends = [*shown["followed_vlm"], *(100 - shown["followed_head"]), *([100] * len(shown))]
    assert [p.get_x() + p.get_width() for p in ax.patches] == pytest.approx(ends)
    vlm, head = (np.asarray(marks.get_offsets())[:, 0] for marks in ax.collections)
    assert np.allclose(vlm, shown["vlm_right"])
    assert np.allclose(head, 100 - shown["head_right"])
    assert ax.get_title().endswith(f"n = {shown['n'].iloc[0]} images, 1 seed")


def test_calibration_draws_its_bins_and_names_its_error(predictions):
    frames = {(d, m): first_seed(predictions[d, m]) for d, m in itertools.product(DATASETS, ("vit", "emovlmkd"))}
    del frames["mini-flickr", "vit"]
    fig = figures.calibration(frames)
    bins = reliability(frames["mini-fi", "emovlmkd"])
    assert np.allclose(fig.axes[1].collections[-1].get_offsets(), bins[["confidence", "accuracy"]])
    table = tables.calibration(predictions, DATASETS, ("vit", "emovlmkd"))
    ece = table.query("dataset == 'mini-fi (drawn)' and model == 'emovlmkd'")["ece"].iloc[0]
    assert fig.axes[1].get_title() == f"EmoVLM-KD\nn = 120, ECE {ece:.1f} %"
    assert words(fig).count("no predictions") == 1


def test_accuracy_cost_puts_each_model_at_its_cost(predictions, settings):
    fig = figures.accuracy_cost(tables.accuracy_cost(cost_of(), predictions, settings))
    head = predictions["mini-fi", "head"]
    right = 100 * (head["prediction"] == head["label"]).mean()
    above, below = fig.axes
    assert above.containers[2].lines[0].get_xydata().tolist() == [[10**7, pytest.approx(right)]]
    assert below.containers[2].lines[0].get_xydata().tolist() == [[14, pytest.approx(right)]]
    across = below.containers[2].lines[2][0].get_segments()[0]
    assert across[:, 0].tolist() == pytest.approx([10.5, 28])
    text = words(fig)
    assert all(name in text for name in ("VLM, tuned", "ViT (teacher)", "10 M", "n = 120, 1/3 seeds"))


def test_examples_show_pictures_truth_and_answers(predictions):
    examples = select_examples(joint(predictions, "mini-fi"), 2)
    pictures = [np.full((8, 8, 3), i, np.uint8) for i in range(len(examples))]
    fig = figures.qualitative_examples(examples, pictures, "mini-fi (drawn)", 120)
    assert [image.get_array()[0, 0, 0] for ax in fig.axes for image in ax.images] == list(range(len(examples)))
    text = words(fig)
    assert "mini-fi (drawn)" in text
    assert "n = 120 images" in text
    right = examples[["vlm_tuned", "vit", "emovlmkd"]].eq(examples["label"], axis=0).to_numpy().sum()
    assert text.count("✓") == right
    one = examples[examples["case"] == "vlm"]
    assert words(figures.qualitative_examples(one, pictures, "x", 120)).count("no such image") == 3


def test_training_curves_average_seeds():
    rows = [
        {"epoch": e, "split": p, "metric": "loss", "value": e + k, "seed": k}
        for e in (1, 2, 3) for p in ("train", "val") for k in (0, 2)
    ]  # fmt: skip
    fig = figures.training_curves({(s, d): rows for s in ("head", "gate") for d in DATASETS})
    assert "head: 2 seeds" in words(fig)
    assert fig.axes[0].lines[0].get_ydata().tolist() == [2, 3, 4]
    assert all(d in words(fig) for d in DATASETS)


def test_pictures_of_notebooks(tmp_path):
    for i in range(4):
        Image.new("RGB", (30, 20), (60 * i, 0, 0)).save(tmp_path / f"{i}.png")
    frame = pd.DataFrame({"label": ["awe", "awe", "fear"], "path": [str(tmp_path / f"{i}.png") for i in range(3)]})
    sheet = figures.sample_sheet(frame, ("awe", "fear"), "three", each=2)
    assert [len(ax.images) for ax in sheet.axes] == [1, 1, 1, 0]
    balance = figures.class_balance(
        pd.DataFrame({"train": [3, 5], "val": [1, 1], "test": [2, 2]}, ["awe", "fear"]), "x"
    )
    assert [bar.get_height() for bar in balance.axes[0].patches] == [3, 5, 1, 1, 2, 2]
    p = pd.Series({"awe": 0.2, "fear": 0.8})
    bars = figures.answer_bars(Image.open(tmp_path / "3.png"), {"head": p, "VLM": p[::-1].to_dict()}, truth="awe")
    assert [ax.get_title() for ax in bars.axes] == ["people say: awe", "head\nfear ✗", "VLM\nfear ✗"]


@pytest.fixture(scope="module")
def hostile():
    """Every figure of a dataset whose name and whose emotions look like formulas and markup."""
    name, labels = "$x$ <b>_{y", ("a$b$", "$\\bad$", "<i>c")
    rng, truth = np.random.default_rng(0), [labels[i % 3] for i in range(60)]
    frames = {}
    for model in MAIN:
        answers = [t if rng.uniform() < 0.6 else labels[rng.integers(3)] for t in truth]
        frames[name, model] = frame_of(answers, truth, labels, rng=rng)
    settings = load_settings("smoke", datasets=[name])
    answers, table = joint(frames, name), tables.complementarity(frames, settings)
    examples = select_examples(answers, 1)
    pictures = [np.zeros((4, 4, 3), np.uint8)] * len(examples)
    curve = {"epoch": 1, "split": "val", "metric": "$m$", "value": 1.0, "seed": 0}
    result = {"dataset": name, "row": "head", "name": "[8]", "alpha": 0.5, "kl": 0.1, "n": 60, "seeds": 1}
    result = pd.DataFrame([{**result, "ours": 50.0, "ci_low": 40.0, "ci_high": 60.0}])
    return name, labels, {
        "confusion": figures.confusion(frames[name, "vit"], name),
        "confusion_difference": figures.confusion_difference(frames[name, "vit"], frames[name, "head"], name),
        "confusion_overview": figures.confusion_overview({name: {"vit": frames[name, "vit"]}}),
        "complementarity_venn": figures.complementarity_venn(table[table["emotion"] == "all"]),
        "complementarity_by_emotion": figures.complementarity_by_emotion(table[table["emotion"] != "all"]),
        "complementarity_upset": figures.complementarity_upset({name: answers}),
        "agreement": figures.agreement({name: agreement_matrix(answers)}, {name: 60}),
        "qualitative_examples": figures.qualitative_examples(examples, pictures, name, 60),
        "gate_weights": figures.gate_weights({name: (labels, np.eye(3, 6))}),
        "gate_trust": figures.gate_trust(tables.gate_trust(frames, [name])),
        "calibration": figures.calibration({(name, m): frames[name, m] for m in QUARTET}),
        "accuracy_cost": figures.accuracy_cost(tables.accuracy_cost(cost_of([name]), frames, settings)),
        "alpha_tradeoff": figures.alpha_tradeoff(result),
        "depth": figures.depth(result),
        "training_curves": figures.training_curves({(name, name): [curve]}),
        "picture_rows": figures.picture_rows({name: [np.zeros((4, 4, 3), np.uint8)]}, name),
        "answer_bars": figures.answer_bars(np.zeros((4, 4, 3)), {name: dict.fromkeys(labels, 0.3)}, labels[0], name),
    }  # fmt: skip


def test_names_are_no_formulas_and_text_is_readable_in_print(hostile):
    name, labels, made = hostile
    named = {n for n, f in inspect.getmembers(figures, inspect.isfunction) if "Figure" in str(f.__annotations__)}
    assert {n for n in named if n[0] != "_"} - {"sample_sheet", "class_balance", "as_image", "as_files"} == set(made)
    for figure, fig in made.items():
        assert name in words(fig).replace("\n", " "), figure  # drawn without an error, and as it is
        texts = [t for t in fig.findobj(Text) if t.get_visible() and t.get_text()]
        assert not [t.get_text() for t in texts if t.get_parse_math() and "$" in t.get_text()], figure
        assert min(t.get_fontsize() for t in texts) >= figures.NOTE, figure
        width = fig.get_size_inches()[0]
        in_print = figure not in ("confusion_overview", "picture_rows", "answer_bars")
        assert not in_print or width <= figures.COLUMN or width == figures.FULL, figure
        if figure in ("confusion", "gate_weights", "gate_trust", "complementarity_by_emotion"):
            assert all(label in words(fig) for label in labels)


def test_models_differ_by_colour_and_by_shape():
    assert len({model_color(m) for m in MAIN}) == len(set(figures.MARKERS.values())) == len(MAIN)
    assert {model_color(m) for m in QUARTET} <= set(figures.PALETTE)


def test_nothing_to_show_is_said(settings):
    nothing = tables.complementarity({}, settings)
    cost = tables.accuracy_cost(cost_of(), {}, settings)
    made = [figures.complementarity_venn(nothing), figures.complementarity_by_emotion(nothing)]
    made += [figures.complementarity_upset({}), figures.agreement({}, {}), figures.calibration({})]
    made += [figures.gate_trust(tables.gate_trust({}, DATASETS)), figures.accuracy_cost(cost)]
    made += [figures.training_curves({}), figures.agreement({"x": pd.DataFrame([[1.0]])}, {"x": 1})]
    assert all("no predictions" in words(fig) for fig in made)


def test_equal_figures_are_equal_files_whatever_the_user_has_set(tmp_path):
    code = """
import hashlib, matplotlib, sys
matplotlib.rcParams.update({"font.size": 20, "svg.hashsalt": None} if len(sys.argv) > 1 else {})
from synthetic import synthetic
from emonb import figures
frames = synthetic(("mini-flickr",), n=24, models=("vit", "head"))
made = [figures.confusion(frames["mini-flickr", "vit"], "x"), figures.calibration({("x", "vit"): frames["mini-flickr", "vit"]})]
print([hashlib.sha256(data).hexdigest() for fig in made for data in figures.as_files(fig).values()])
"""
    where = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "MPLCONFIGDIR": str(tmp_path)}
    runs = [subprocess.run([sys.executable, "-c", code, *a], env=where, capture_output=True) for a in ((), ("x",))]
    assert runs[0].returncode == 0, runs[0].stderr
    assert runs[0].stdout == runs[1].stdout


def test_small_images_with_alt_text_and_no_pyplot_state(predictions):
    fig = figures.confusion(predictions["mini-flickr", "vit"], "x")
    png, jpeg = figures.as_image(fig, "a matrix"), figures.as_image(fig, "a matrix", photo=True)
    assert (png.data[:4], jpeg.data[:2]) == (b"\x89PNG", b"\xff\xd8")
    assert png.alt == "a matrix"
    assert len(png.data) < 60_000
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()
