"""Figures: the numbers drawn are those of plain pandas; labels, images and seeds are in the picture."""

import itertools
import sys

import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.text import Text
from synthetic import frame_of, synthetic

from emonb import complementarity as co
from emonb import figures, tables
from emonb.emotions import TAXONOMIES
from emonb.figure_style import COLUMN, FULL, MODEL_COLORS, MODEL_MARKERS, NOTE, OKABE_ITO
from emonb.figures_gate import lift
from emonb.model_tables import accuracy_cost_table, calibration_table, gate_trust_table
from emonb.settings import load_settings

DATASETS = ("mini-fi", "mini-emotion6", "mini-flickr")
LABELS = TAXONOMIES["mikels8"].labels
SENTIMENTS = ("positive", "negative")


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


def cost_of(datasets=("mini-fi",), models=("vlm_tuned", "vit", "head", "emovlmkd")):
    """A made-up table `cost`."""
    rows = [
        {"dataset": f"{d} (drawn)", "model": m, "name": m, "parameters": 10**k, "trainable": 1, "ms_median": 2.0 * k,
         "ms_low": 1.5 * k, "ms_high": 4.0 * k, "n": 16, "device": "cpu"}
        for d in datasets for k, m in enumerate(models, 5)
    ]  # fmt: skip
    return pd.DataFrame(rows)


def test_confusion_shows_all_labels_counts_and_basis(predictions):
    frame = predictions["mini-fi", "emovlmkd"]
    fig = figures.confusion(frame, "EmoVLM-KD on mini-fi (drawn)")
    text = words(fig)
    assert all(text.count(label) >= 2 for label in LABELS)
    assert "n = 120 images, 3 seeds" in text
    mesh = fig.axes[0].collections[0].get_array().reshape(8, 8)
    assert np.allclose(mesh.sum(axis=1), 100)
    awe = frame[frame["label"] == "awe"]
    assert mesh[2, 2] == pytest.approx(100 * (awe["prediction"] == "awe").mean())
    labels = [t.get_text() for t in fig.axes[0].get_yticklabels()]
    assert tuple(labels) == LABELS
    notes = {t.get_position(): t.get_text() for t in fig.axes[0].texts}
    hits = (awe["prediction"] == "awe").sum()
    assert notes[2.5, 2.5] == f"{100 * hits / len(awe):.0f} %\n{hits}"


def test_confusion_gives_unparsable_answers_a_column_and_takes_an_ax(predictions):
    from matplotlib.figure import Figure

    ax = Figure().subplots()
    fig = figures.confusion(predictions["mini-fi", "vlm_generated"], "generated", ax=ax)
    assert fig is ax.figure
    assert [t.get_text() for t in ax.get_xticklabels()][-1] == "(unparsable)"
    assert "1 seed" in ax.get_title()
    assert "seeds" not in ax.get_title()


def test_difference_is_in_points_on_common_images(predictions):
    a, b = predictions["mini-fi", "emovlmkd"], predictions["mini-fi", "vlm_tuned"].iloc[:96]
    ax = figures.confusion_difference(a, b, "a minus b").axes[0]
    a = a[a["image_id"].isin(b["image_id"])]
    want = [
        pd.crosstab(f["label"], f["prediction"], normalize="index").reindex(index=LABELS, columns=LABELS, fill_value=0)
        for f in (a, b)
    ]
    want = 100 * (want[0] - want[1]).to_numpy()
    mesh = ax.collections[0]
    assert np.allclose(mesh.get_array().reshape(8, 8), want)
    low, high = mesh.get_clim()
    assert low == -high == -np.abs(want).max(), "zero is the colour in the middle"
    notes = {t.get_position(): t.get_text() for t in ax.texts}
    assert notes == {(c + 0.5, r + 0.5): f"{want[r, c]:+.0f}" for r, c in np.ndindex(8, 8) if want[r, c].round() != 0}
    assert "n = 96 images, 3 and 1 seeds" in ax.get_title()


def test_difference_keeps_a_column_of_unparsable_answers(predictions):
    pair = predictions["mini-fi", "vlm_generated"], predictions["mini-fi", "vlm_tuned"]
    ax = figures.confusion_difference(*pair, "x").axes[0]
    assert [t.get_text() for t in ax.get_xticklabels()] == [*LABELS, "(unparsable)"]
    assert ax.collections[0].get_array().reshape(8, 9)[:, -1].min() >= 0


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
    venn = figures.complementarity_venn(overall)
    text = words(venn)
    for ax, row in zip(venn.axes, overall.to_dict("records"), strict=True):
        assert row["dataset"] in text
        assert f"only VLM\n{row['only_VLM_right']}\n" in text
        assert f"neither: {row['neither_right']} " in text
        areas = [np.pi * circle.radius**2 for circle in ax.patches]
        assert areas == pytest.approx([row["both_right"] + row[f"only_{m}_right"] for m in ("VLM", "ViT")])
    fig = figures.complementarity_by_emotion(single)
    text = words(fig)
    assert all(f"{e} ({n})" in text for e, n in zip(single["emotion"], single["n"], strict=True))
    assert text.count("n = 120 images, 1 seed") == 3
    widths = [bar.get_width() for bar in fig.axes[0].patches]
    assert sum(widths) == pytest.approx(800)  # eight emotions of 100 %
    first = single[single["dataset"] == "mini-fi (drawn)"].iloc[::-1]  # the first emotion is on top
    assert widths[:8] == pytest.approx((100 * first["both_right"] / first["n"]).tolist())


def test_upset_bars_and_dots_are_the_intersections(predictions):
    joint = {d: co.joint(predictions, d) for d in DATASETS}
    fig = figures.complementarity_upset(joint)
    *axes, dots = fig.axes
    rows = [m.get_text() for m in dots.get_yticklabels()]
    assert rows == ["VLM, tuned", "ViT (teacher)", "distilled head", "EmoVLM-KD"]
    filled = {tuple(np.round(xy).astype(int)) for xy in dots.collections[-1].get_offsets()}
    count = len(axes[0].patches)
    for ax, table in zip(axes, joint.values(), strict=True):
        hits = table[list(co.QUARTET)].eq(table["label"], axis=0)
        for column in range(count):
            combination = [(column, k) in filled for k in range(4)]
            n = (hits == combination).all(axis=1).sum()
            assert ax.patches[column].get_height() == pytest.approx(100 * n / 120)
            assert ax.texts[column].get_text() == str(n)
            blue = to_hex(ax.patches[column].get_facecolor()).upper() == MODEL_COLORS["emovlmkd"]
            assert blue == combination[3]
        assert sum(int(t.get_text()) for t in ax.texts) == 120


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
    kappa = co.agreement_matrix(joint["mini-fi"]).loc["vlm_tuned", "vlm_zero_shot"]
    assert agreement.axes[0].texts[0].get_text() == f"{kappa:.2f}".replace("0.", ".")
    assert [t.get_text() for t in figures.alpha_tradeoff(alpha).axes[0].texts] == ["0", "0.25", "0.5", "0.75", "1"]


def test_lift_ignores_what_a_softmax_ignores():
    half = np.array([[3.0, 1.0, 0.0], [0.0, 2.0, 0.0], [1.0, -1.0, 5.0]])
    assert lift(half).tolist() == [2.5, 2.0, 5.0]
    assert np.allclose(lift(half + np.array([10, -4, 7])), lift(half))


def test_gate_weights_are_the_two_halves():
    rng = np.random.default_rng(0)
    weights = {"a": (LABELS, rng.normal(size=(8, 16))), "b": (SENTIMENTS, rng.normal(size=(2, 4)))}
    fig = figures.gate_weights(weights)
    arrays = [c.get_array() for ax in fig.axes for c in ax.collections]
    meshes = [a for a in arrays if a is not None and a.size in (64, 4)]
    want = [half for _, w in weights.values() for half in np.split(w, 2, axis=1)]
    assert all(np.allclose(np.ravel(m), np.ravel(w)) for m, w in zip(meshes, want, strict=True))
    bars = [[p.get_width() for p in ax.patches] for ax in fig.axes if ax.patches]
    for drawn, (_, w) in zip(bars, weights.values(), strict=True):
        assert drawn == pytest.approx([*lift(w[:, : len(w)]), *lift(w[:, len(w) :])])
    text = words(fig)
    assert all(text.count(label) == 4 for label in ("amusement", "positive")), "rows once, columns twice, bars once"


def test_gate_trust_counts_disagreements(predictions):
    table = gate_trust_table(predictions, DATASETS)
    joint = co.joint(predictions, "mini-fi")
    apart = joint[joint["vlm_tuned"] != joint["head"]]
    fear = table.query("dataset == 'mini-fi (drawn)' and emotion == 'fear'").iloc[0]
    part = apart[apart["label"] == "fear"]
    assert fear["n"] == len(part)
    assert fear["followed_vlm"] == pytest.approx(100 * (part["emovlmkd"] == part["vlm_tuned"]).mean())
    assert fear["head_right"] == pytest.approx(100 * (part["head"] == "fear").mean())
    followed = table[["followed_vlm", "followed_head", "followed_neither"]]
    assert np.allclose(followed.sum(axis=1), 100)
    assert table.loc[table["emotion"] == "all", "n"].iloc[0] == len(apart)
    fig = figures.gate_trust(table)
    shown = table[table["dataset"] == "mini-fi (drawn)"].iloc[::-1]
    ax = fig.axes[0]
    assert [p.get_width() for p in ax.patches[: len(shown)]] == pytest.approx(shown["followed_vlm"].tolist())
    assert [p.get_x() + p.get_width() for p in ax.patches] == pytest.approx(
        [*shown["followed_vlm"], *(100 - shown["followed_head"]), *([100] * len(shown))]
    )
    vlm, head = (np.asarray(marks.get_offsets())[:, 0] for marks in ax.collections)
    assert np.allclose(vlm, shown["vlm_right"])
    assert np.allclose(head, 100 - shown["head_right"])


def test_calibration_draws_its_bins_and_names_its_error(predictions):
    from emonb.metrics import reliability

    frames = {(d, m): co.first_seed(predictions[d, m]) for d, m in itertools.product(DATASETS, ("vit", "emovlmkd"))}
    del frames["mini-flickr", "vit"]
    fig = figures.calibration(frames)
    bins = reliability(frames["mini-fi", "emovlmkd"])
    points = fig.axes[1].collections[-1].get_offsets()
    assert np.allclose(points, bins[["confidence", "accuracy"]])
    table = calibration_table(predictions, DATASETS, ("vit", "emovlmkd"))
    ece = table.query("dataset == 'mini-fi (drawn)' and model == 'emovlmkd'")["ece"].iloc[0]
    assert fig.axes[1].get_title() == f"EmoVLM-KD\nn = 120, ECE {ece:.1f} %"
    assert words(fig).count("no predictions") == 1


def test_accuracy_cost_puts_each_model_at_its_cost(predictions, settings):
    table = accuracy_cost_table(cost_of(), predictions, settings)
    fig = figures.accuracy_cost(table)
    head = predictions["mini-fi", "head"]
    right = 100 * (head["prediction"] == head["label"]).mean()
    above, below = fig.axes
    assert above.containers[2].lines[0].get_xydata().tolist() == [[10**7, pytest.approx(right)]]
    assert below.containers[2].lines[0].get_xydata().tolist() == [[14, pytest.approx(right)]]
    across = below.containers[2].lines[2][0].get_segments()[0]
    assert across[:, 0].tolist() == pytest.approx([10.5, 28])
    text = words(fig)
    assert all(name in text for name in ("VLM, tuned", "ViT (teacher)", "10 M", "n = 120, 1/3 seeds"))
    without = {key: frame for key, frame in predictions.items() if key != ("mini-fi", "head")}
    assert "head" not in set(accuracy_cost_table(cost_of(), without, settings)["model"])


def test_examples_show_pictures_truth_and_answers(predictions):
    examples = co.select_examples(co.joint(predictions, "mini-fi"), 2)
    pictures = [np.full((8, 8, 3), i, np.uint8) for i in range(len(examples))]
    fig = figures.qualitative_examples(examples, pictures, "mini-fi (drawn)", 120)
    shown = [image.get_array()[0, 0, 0] for ax in fig.axes for image in ax.images]
    assert shown == list(range(len(examples)))
    text = words(fig)
    assert "mini-fi (drawn)" in text
    assert "n = 120 images" in text
    right = examples[["vlm_tuned", "vit", "emovlmkd"]].eq(examples["label"], axis=0).to_numpy().sum()
    assert text.count("✓") == right
    empty = figures.qualitative_examples(examples.iloc[:0], [], "none", 0)
    assert words(empty).count("no such image") == 4


def test_training_curves_average_seeds():
    rows = [
        {"stage": s, "dataset": d, "epoch": e, "split": p, "metric": "loss", "value": e + k, "seed": k}
        for s in ("head", "gate") for d in DATASETS for e in (1, 2, 3) for p in ("train", "val") for k in (0, 2)
    ]  # fmt: skip
    fig = figures.training_curves(pd.DataFrame(rows))
    assert "head: 2 seeds" in words(fig)
    assert fig.axes[0].lines[0].get_ydata().tolist() == [2, 3, 4]
    assert all(d in words(fig) for d in DATASETS)


@pytest.fixture(scope="module")
def hostile():
    """Every figure of a dataset whose name and whose emotions look like formulas and markup."""
    name, labels = "$x$ <b>_{y", ("a$b$", "$\\bad$", "<i>c")
    rng, truth = np.random.default_rng(0), [labels[i % 3] for i in range(60)]
    frames = {}
    for model in co.MODELS:
        answers = [t if rng.uniform() < 0.6 else labels[rng.integers(3)] for t in truth]
        frames[name, model] = frame_of(answers, truth, labels, rng=rng)
    settings = load_settings("smoke", datasets=[name])
    joint = co.joint(frames, name)
    table = co.complementarity_table(frames, settings)
    examples = co.select_examples(joint, 1)
    pictures = [np.zeros((4, 4, 3), np.uint8)] * len(examples)
    curve = {"stage": name, "dataset": name, "epoch": 1, "split": "val", "metric": "$m$", "value": 1.0, "seed": 0}
    result = {"dataset": name, "row": "head", "name": "[8]", "alpha": 0.5, "kl": 0.1, "n": 60, "seeds": 1}
    result = pd.DataFrame([{**result, "ours": 50.0, "ci_low": 40.0, "ci_high": 60.0}])
    cost = cost_of().assign(dataset=name)
    return name, labels, {
        "confusion": figures.confusion(frames[name, "vit"], name),
        "confusion_difference": figures.confusion_difference(frames[name, "vit"], frames[name, "head"], name),
        "complementarity_venn": figures.complementarity_venn(table[table["emotion"] == "all"]),
        "complementarity_by_emotion": figures.complementarity_by_emotion(table[table["emotion"] != "all"]),
        "complementarity_upset": figures.complementarity_upset({name: joint}),
        "agreement": figures.agreement({name: co.agreement_matrix(joint)}, {name: 60}),
        "qualitative_examples": figures.qualitative_examples(examples, pictures, name, 60),
        "gate_weights": figures.gate_weights({name: (labels, np.eye(3, 6))}),
        "gate_trust": figures.gate_trust(gate_trust_table(frames, [name])),
        "calibration": figures.calibration({(name, m): frames[name, m] for m in co.QUARTET}),
        "accuracy_cost": figures.accuracy_cost(accuracy_cost_table(cost, frames, settings)),
        "alpha_tradeoff": figures.alpha_tradeoff(result),
        "depth": figures.depth(result),
        "training_curves": figures.training_curves(pd.DataFrame([curve])),
    }  # fmt: skip


@pytest.mark.parametrize("figure", [name for name in figures.__all__ if name != "as_image"])
def test_names_are_no_formulas_and_text_is_readable_in_print(hostile, figure):
    name, _, made = hostile
    fig = made[figure]
    assert name in words(fig).replace("\n", " ")  # drawn without an error, and as it is
    texts = [t for t in fig.findobj(Text) if t.get_visible() and t.get_text()]
    assert not [t.get_text() for t in texts if t.get_parse_math() and "$" in t.get_text()]
    assert min(t.get_fontsize() for t in texts) >= NOTE
    width = fig.get_size_inches()[0]
    assert width <= FULL
    assert width == FULL or width <= COLUMN
    if figure in ("confusion", "gate_weights", "gate_trust", "complementarity_by_emotion"):
        assert all(label in words(fig) for label in hostile[1])


def test_front_door_describes_every_figure():
    assert all(f"- `{name}`: " in figures.__doc__ for name in figures.__all__)
    assert all(getattr(figures, name).__doc__ for name in figures.__all__)


def test_models_differ_by_colour_and_by_shape():
    assert set(MODEL_COLORS) == set(MODEL_MARKERS) == set(co.MODELS)
    assert len(set(MODEL_COLORS.values())) == len(set(MODEL_MARKERS.values())) == len(co.MODELS)
    assert {MODEL_COLORS[m] for m in co.QUARTET} <= set(OKABE_ITO)


def test_nothing_to_show_is_said(settings):
    made = [
        figures.complementarity_venn(co.complementarity_table({}, settings)),
        figures.complementarity_by_emotion(co.complementarity_table({}, settings)),
        figures.complementarity_upset({}),
        figures.agreement({}, {}),
        figures.gate_trust(gate_trust_table({}, DATASETS)),
        figures.calibration({}),
        figures.accuracy_cost(accuracy_cost_table(cost_of(), {}, settings)),
        figures.training_curves(pd.DataFrame()),
    ]
    assert all("no predictions" in words(fig) for fig in made)


def test_small_images_with_alt_text_and_no_pyplot_state(predictions):
    fig = figures.confusion(predictions["mini-flickr", "vit"], "x")
    png, jpeg = figures.as_image(fig, "a matrix"), figures.as_image(fig, "a matrix", photo=True)
    assert png.data[:4] == b"\x89PNG"
    assert jpeg.data[:2] == b"\xff\xd8"
    assert png.alt == "a matrix"
    assert len(png.data) < 60_000
    assert not sys.modules["matplotlib.pyplot"].get_fignums()
