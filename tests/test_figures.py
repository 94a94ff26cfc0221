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
from emonb.metrics import calibration_error, kappa, reliability
from emonb.predictions import MAIN, QUARTET, first_seed, joint, model_color, select_examples
from emonb.settings import load_settings

LABELS = TAXONOMIES["mikels8"].labels
ODD, ODD_LABELS = "$x$ <b>_{y", ("a$b$", "$\\bad$", "<i>c")  # names that look like formulas and markup
TITLES = ("mini-fi (drawn)", ODD)
COUNTS = ["both_right", "only_VLM_right", "only_ViT_right", "neither_right"]


@pytest.fixture(scope="module")
def world():
    """Predictions of two datasets, the settings, and both datasets' joint answers by title."""
    found = synthetic(("mini-fi",), n=120)
    rng, truth = np.random.default_rng(0), [ODD_LABELS[i % 3] for i in range(60)]
    for model in [model for _, model in found if model != "vlm_generated"]:
        answers = [t if rng.uniform() < 0.6 else ODD_LABELS[rng.integers(3)] for t in truth]
        found[ODD, model] = frame_of(answers, truth, ODD_LABELS, rng=rng)
    settings = load_settings("smoke", datasets=["mini-fi", ODD])
    return found, settings, {title: joint(found, d) for title, d in zip(TITLES, ("mini-fi", ODD), strict=True)}


def cost_of():
    """A made-up table of accuracy and cost."""
    table = pd.DataFrame([(d, m, 10.0**k, k) for d in TITLES for k, m in enumerate(QUARTET, 5)])
    table = table.set_axis(["dataset", "model", "parameters", "k"], axis=1).astype({"parameters": int})
    times = {"ms_low": 1.5 * table["k"], "ms_median": 2.0 * table["k"], "ms_high": 4.0 * table["k"], "n": 120}
    of = {"accuracy": 50.0 + table["k"], "low": 50.0, "high": 60.0, "seeds": np.where(table["k"] < 7, 1, 3)}
    return table.assign(**times, **of)


def trust_of():
    """A made-up table `gate_trust`."""
    where = ["dataset", "emotion", "n", "followed_vlm", "followed_head", "followed_neither"]
    rows = [
        (title, emotion, 20, 30.0, 50.0, 20.0, 40.0, 35.0, 45.0)
        for title in TITLES
        for emotion in ("all", *ODD_LABELS)
    ]
    return pd.DataFrame(rows, columns=[*where, "vlm_right", "head_right", "gate_right"])


@pytest.fixture(scope="module")
def made(world):
    """Every figure, of both datasets where it takes several."""
    found, settings, answers = world
    table, odd = tables.complementarity(found, settings), {m: found[ODD, m] for m in MAIN}
    examples = select_examples(answers[ODD], 2)
    pictures = [np.full((8, 8, 3), i, np.uint8) for i in range(len(examples))]
    rng, row = np.random.default_rng(0), {"split": "val", "metric": "loss"}
    history = [{**row, "epoch": e, "value": e + k, "seed": k} for e in (1, 2, 3) for k in (0, 2)]
    weights = {TITLES[0]: (LABELS, rng.normal(size=(8, 16))), ODD: (ODD_LABELS, rng.normal(size=(3, 6)))}
    first = {(t, m): first_seed(found[d, m]) for t, d in zip(TITLES, ("mini-fi", ODD), strict=True) for m in QUARTET}
    del first["mini-fi (drawn)", "vit"]
    kappas = {t: pd.DataFrame({b: {a: kappa(j[a], j[b]) for a in MAIN} for b in MAIN}) for t, j in answers.items()}
    return {
        "confusion": figures.confusion(odd["vit"], ODD),
        "confusion_difference": figures.confusion_difference(odd["vit"], odd["head"], ODD),
        "confusion_overview": figures.confusion_overview({ODD: odd}),
        "complementarity_venn": figures.complementarity_venn(table[table["emotion"] == "all"]),
        "complementarity_by_emotion": figures.complementarity_by_emotion(table[table["emotion"] != "all"]),
        "complementarity_upset": figures.complementarity_upset(answers),
        "agreement": figures.agreement(kappas, dict.fromkeys(TITLES, 120)),
        "qualitative_examples": figures.qualitative_examples(examples, pictures, ODD, 60),
        "gate_weights": figures.gate_weights(weights),
        "gate_trust": figures.gate_trust(trust_of()),
        "calibration": figures.calibration(first),
        "accuracy_cost": figures.accuracy_cost(cost_of()),
        "alpha_tradeoff": figures.alpha_tradeoff(tables.alpha(found, settings)),
        "depth": figures.depth(tables.depth(found, settings)),
        "training_curves": figures.training_curves({("head", t): history for t in TITLES}),
        "picture_rows": figures.picture_rows({ODD: pictures}, ODD),
        "answer_bars": figures.answer_bars(pictures[0], {ODD: dict.fromkeys(ODD_LABELS, 0.3)}, ODD_LABELS[0], ODD),
    }


def words(fig):
    """All visible text of a figure, tick labels included: those exist only once it is drawn."""
    FigureCanvasAgg(fig).draw()
    return "\n".join(t.get_text() for t in fig.findobj(Text) if t.get_visible())


def notes_of(ax):
    return {t.get_position(): t.get_text() for t in ax.texts if t.get_text()}


def test_names_are_no_formulas_and_text_is_readable_in_print(made):
    public = {n: f for n, f in inspect.getmembers(figures, inspect.isfunction) if n[0] != "_"}
    drawing = {n for n, f in public.items() if f.__annotations__.get("return") == "Figure"}
    assert drawing - {"sample_sheet", "class_balance"} == set(made)
    for figure, fig in made.items():
        assert ODD in words(fig).replace("\n", " "), figure  # drawn without an error, and as it is
        texts = [t for t in fig.findobj(Text) if t.get_visible() and t.get_text()]
        assert not [t.get_text() for t in texts if t.get_parse_math() and "$" in t.get_text()], figure
        assert min(t.get_fontsize() for t in texts) >= figures.NOTE, figure
        width = fig.get_size_inches()[0]
        in_print = figure not in ("confusion_overview", "picture_rows", "answer_bars")
        assert not in_print or width <= figures.FULL, figure
        if figure in ("confusion", "gate_weights", "gate_trust", "complementarity_by_emotion"):
            assert all(label in words(fig) for label in ODD_LABELS)


def test_confusion_shows_all_labels_counts_and_basis(world):
    frame = world[0]["mini-fi", "emovlmkd"]
    ax = figures.confusion(frame, "EmoVLM-KD").axes[0]
    mesh = ax.collections[0].get_array().reshape(8, 8)
    assert np.allclose(mesh.sum(axis=1), 100)
    awe = frame[frame["label"] == "awe"]
    hits = (awe["prediction"] == "awe").sum()
    assert mesh[2, 2] == pytest.approx(100 * hits / len(awe))
    assert notes_of(ax)[2.5, 2.5] == f"{100 * hits / len(awe):.0f} %\n{hits}"
    assert tuple(t.get_text() for t in ax.get_yticklabels()) == LABELS
    assert ax.get_title() == "EmoVLM-KD\nn = 120 images, 3 seeds"
    free = figures.confusion(world[0]["mini-fi", "vlm_generated"], "generated").axes[0]
    assert [t.get_text() for t in free.get_xticklabels()][-1] == "(unparsable)"
    assert free.get_title().endswith("1 seed")


def test_difference_is_in_points_on_common_images(world):
    a, b = world[0]["mini-fi", "emovlmkd"], world[0]["mini-fi", "vlm_tuned"].iloc[:96]
    ax = figures.confusion_difference(a, b, "a minus b").axes[0]
    counts = [
        pd.crosstab(f["label"], f["prediction"], normalize="index") for f in (a[a["image_id"].isin(b["image_id"])], b)
    ]
    want = 100 * np.subtract(*(c.reindex(index=LABELS, columns=LABELS, fill_value=0).to_numpy() for c in counts))
    mesh = ax.collections[0]
    assert np.allclose(mesh.get_array().reshape(8, 8), want)
    low, high = mesh.get_clim()
    assert low == -high == -np.abs(want).max(), "zero is the colour in the middle"
    shown = {(c + 0.5, r + 0.5): f"{want[r, c]:+.0f}" for r, c in np.ndindex(8, 8) if want[r, c].round() != 0}
    assert notes_of(ax) == shown
    assert "n = 96 images, 3 and 1 seeds" in ax.get_title()


def test_overview_has_a_panel_for_each_matrix(made, world):
    axes = made["confusion_overview"].axes
    table = world[2][ODD]
    shares = pd.crosstab(table["label"], table["emovlmkd"], normalize="index").loc[list(ODD_LABELS), list(ODD_LABELS)]
    assert [ax.get_title() for ax in axes][-1] == "EmoVLM-KD"
    assert np.allclose(axes[-1].collections[0].get_array().reshape(3, 3), 100 * shares)
    assert axes[0].get_ylabel() == f"{ODD}\nn = 60 images, 1 seed\ntrue"


def test_circles_and_bars_show_the_counts(made, world):
    table = tables.complementarity(*world[:2])
    for ax, (_, row) in zip(
        made["complementarity_venn"].axes, table[table["emotion"] == "all"].iterrows(), strict=False
    ):
        text = "\n".join(notes_of(ax).values())
        assert ax.get_title().startswith(row["dataset"])
        assert f"only VLM\n{row['only_VLM_right']}\n" in text
        assert f"neither: {row['neither_right']} " in text
        vlm, vit = (circle.radius**2 for circle in ax.patches)
        assert vlm / vit == pytest.approx((row[COUNTS[0]] + row[COUNTS[1]]) / (row[COUNTS[0]] + row[COUNTS[2]]))
    single = table[(table["emotion"] != "all") & (table["dataset"] == TITLES[0])]
    ax = made["complementarity_by_emotion"].axes[0]
    widths = np.reshape([bar.get_width() for bar in ax.patches], (4, 8))
    assert np.allclose(widths.T, 100 * single[COUNTS].div(single["n"], axis=0))
    assert [t.get_text() for t in ax.get_yticklabels()] == [f"{e} (15)" for e in LABELS]
    assert ax.get_title(loc="left") == "mini-fi (drawn), n = 120 images, 1 seed"


@pytest.mark.parametrize("counts", [(0, 0, 0, 9), (4, 0, 5, 0), (0, 6, 3, 0), (9, 0, 0, 0), (1, 40, 7, 0)])
def test_circles_of_odd_counts_keep_their_texts_apart(counts):
    table = pd.DataFrame([{"dataset": "d", "n": sum(counts), **dict(zip(COUNTS, counts, strict=True))}])
    fig = figures.complementarity_venn(table)
    canvas = FigureCanvasAgg(fig)
    canvas.draw()
    boxes = [text.get_window_extent(canvas.get_renderer()) for text in [*fig.axes[0].texts, fig.axes[0].title]]
    assert not [1 for a, b in itertools.combinations(boxes, 2) if a.overlaps(b)]


def test_upset_bars_and_dots_are_the_intersections(made, world):
    *axes, dots = made["complementarity_upset"].axes
    rows = [m.get_text() for m in dots.get_yticklabels()]
    assert rows == ["VLM, tuned", "ViT (teacher)", "distilled head", "EmoVLM-KD"]
    filled = {tuple(np.round(xy).astype(int)) for xy in dots.collections[-1].get_offsets()}
    for ax, table in zip(axes, world[2].values(), strict=True):
        hits = table[list(QUARTET)].eq(table["label"], axis=0)
        for column, bar in enumerate(ax.patches):
            combination = [(column, k) in filled for k in range(4)]
            n = (hits == combination).all(axis=1).sum()
            assert bar.get_height() == pytest.approx(100 * n / len(table))
            assert ax.texts[column].get_text() == str(n)
            assert (to_hex(bar.get_facecolor()).upper() == model_color("emovlmkd")) == combination[3]
        assert sum(int(t.get_text()) for t in ax.texts) == len(table)


def test_agreement_alpha_and_depth_name_their_basis(made, world):
    both = kappa(*(world[2][TITLES[0]][model] for model in ("vlm_tuned", "vlm_zero_shot")))
    assert notes_of(made["agreement"].axes[0])[0.5, 0.5] == f"{both:.2f}".replace("0.", ".")
    alpha = made["alpha_tradeoff"].axes[0]
    assert [t.get_text() for t in alpha.texts] == ["0", "0.25", "0.5", "0.75", "1"]
    for name, seeds in (("agreement", "1 seed"), ("alpha_tradeoff", "3 seeds"), ("depth", "3 seeds")):
        assert made[name].axes[0].get_title() == f"mini-fi (drawn)\nn = 120 images, {seeds}"
    table = tables.depth(*world[:2]).query("dataset == 'mini-fi (drawn)' and ours == ours")
    assert made["depth"].axes[0].lines[0].get_ydata().tolist() == table["ours"].tolist()


def test_gate_weights_are_the_two_halves_and_trust_is_its_table(made, world):
    half = np.array([[3.0, 1.0, 0.0], [0.0, 2.0, 0.0], [1.0, -1.0, 5.0]])
    assert figures.lift(half).tolist() == [2.5, 2.0, 5.0]
    assert np.allclose(figures.lift(half + np.array([10, -4, 7])), figures.lift(half)), "what a softmax ignores"
    vlm, head, bars = made["gate_weights"].axes[:3]
    halves = np.random.default_rng(0).normal(size=(8, 16))[:, :8], np.random.default_rng(0).normal(size=(8, 16))[:, 8:]
    for ax, part in zip((vlm, head), halves, strict=True):
        assert np.allclose(ax.collections[0].get_array().reshape(8, 8), part)
    assert [p.get_width() for p in bars.patches] == pytest.approx([*figures.lift(halves[0]), *figures.lift(halves[1])])
    shown = trust_of().query("dataset == @TITLES[0]")
    ax = made["gate_trust"].axes[0]
    ends = [*shown["followed_vlm"], *(100 - shown["followed_head"]), *([100] * len(shown))]
    assert [p.get_x() + p.get_width() for p in ax.patches] == pytest.approx(ends)
    marks = [np.asarray(marks.get_offsets())[:, 0] for marks in ax.collections]
    assert np.allclose(marks, [shown["vlm_right"], 100 - shown["head_right"]])
    assert ax.get_title().endswith(f"n = {shown['n'].iloc[0]} images, 1 seed")


def test_calibration_draws_its_bins_and_names_its_error(made, world):
    frame, axes = first_seed(world[0]["mini-fi", "emovlmkd"]), made["calibration"].axes
    assert np.allclose(axes[3].collections[-1].get_offsets(), reliability(frame)[["confidence", "accuracy"]])
    assert axes[3].get_title() == f"EmoVLM-KD\nn = 120, ECE {calibration_error(frame):.1f} %"
    assert words(made["calibration"]).count("no predictions") == 1


def test_accuracy_cost_puts_each_model_at_its_cost(made):
    above, _, below, _ = made["accuracy_cost"].axes
    assert above.containers[2].lines[0].get_xydata().tolist() == [[10**7, 57]]
    assert below.containers[2].lines[0].get_xydata().tolist() == [[14, 57]]
    across = below.containers[2].lines[2][0].get_segments()[0]
    assert across[:, 0].tolist() == pytest.approx([10.5, 28])
    assert all(text in words(made["accuracy_cost"]) for text in ("VLM, tuned", "10 M", "n = 120, 1/3 seeds"))


def test_examples_show_pictures_truth_and_answers(made, world):
    fig, examples = made["qualitative_examples"], select_examples(world[2][ODD], 2)
    assert [image.get_array()[0, 0, 0] for ax in fig.axes for image in ax.images] == list(range(len(examples)))
    right = examples[["vlm_tuned", "vit", "emovlmkd"]].eq(examples["label"], axis=0).to_numpy().sum()
    assert words(fig).count("✓") == right
    one = figures.qualitative_examples(examples[examples["case"] == "vlm"], [np.zeros((4, 4, 3))] * 2, "x", 60)
    assert words(one).count("no such image") == 3


def test_training_curves_average_seeds(made):
    ax = made["training_curves"].axes[0]
    assert ax.get_title() == "head: 2 seeds"
    assert ax.lines[0].get_ydata().tolist() == [2, 3, 4]


def test_pictures_of_notebooks(tmp_path):
    for i in range(3):
        Image.new("RGB", (30, 20), (60 * i, 0, 0)).save(tmp_path / f"{i}.png")
    frame = pd.DataFrame({"label": ["awe", "awe", "fear"], "path": [str(tmp_path / f"{i}.png") for i in range(3)]})
    sheet = figures.sample_sheet(frame, ("awe", "fear"), "three", each=2)
    assert [len(ax.images) for ax in sheet.axes] == [1, 1, 1, 0]
    counts = pd.DataFrame({"train": [3, 5], "val": [1, 1], "test": [2, 2]}, ["awe", "fear"])
    bars = figures.class_balance(counts, "x").axes[0].patches
    assert [bar.get_height() for bar in bars] == [3, 5, 1, 1, 2, 2]
    p = pd.Series({"awe": 0.2, "fear": 0.8})
    fig = figures.answer_bars(Image.open(tmp_path / "2.png"), {"head": p, "VLM": p[::-1].to_dict()}, truth="awe")
    assert [ax.get_title() for ax in fig.axes] == ["people say: awe", "head\nfear ✗", "VLM\nfear ✗"]


def test_models_differ_by_colour_and_by_shape():
    assert len({model_color(m) for m in MAIN}) == len(set(figures.MARKERS.values())) == len(MAIN)
    assert {model_color(m) for m in QUARTET} <= set(figures.PALETTE)


def test_nothing_to_show_is_said(world):
    nothing = tables.complementarity({}, world[1])
    alone = pd.DataFrame([[1.0]], ["vit"], ["vit"])
    made = [figures.complementarity_venn(nothing), figures.complementarity_by_emotion(nothing)]
    made += [figures.complementarity_upset({}), figures.agreement({"x": alone}, {"x": 1}), figures.calibration({})]
    made += [figures.gate_trust(trust_of()[:0]), figures.accuracy_cost(cost_of()[:0])]
    assert all("no predictions" in words(fig) for fig in [*made, figures.training_curves({})])


def test_equal_figures_are_equal_files_whatever_the_user_has_set(tmp_path):
    code = """
import hashlib, matplotlib, sys
matplotlib.rcParams.update({"font.size": 20, "svg.hashsalt": None} if len(sys.argv) > 1 else {})
from synthetic import synthetic
from emonb import figures
vit = synthetic(("mini-flickr",), n=24, models=("vit",))["mini-flickr", "vit"]
made = [figures.confusion(vit, "x"), figures.calibration({("x", "vit"): vit})]
print([hashlib.sha256(data).hexdigest() for fig in made for data in figures.as_files(fig).values()])
"""
    where = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "MPLCONFIGDIR": str(tmp_path)}
    runs = [subprocess.run([sys.executable, "-c", code, *a], env=where, capture_output=True) for a in ((), ("x",))]
    assert runs[0].returncode == 0, runs[0].stderr
    assert runs[0].stdout == runs[1].stdout


def test_small_images_with_alt_text_and_no_pyplot_state(made):
    png, jpeg = figures.as_image(made["depth"], "heads"), figures.as_image(made["depth"], "heads", photo=True)
    assert (png.data[:4], jpeg.data[:2], png.alt) == (b"\x89PNG", b"\xff\xd8", "heads")
    assert len(png.data) < 60_000
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()
