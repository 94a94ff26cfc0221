"""Figures: the numbers drawn are those of plain pandas; labels, images and seeds are in the picture."""

import inspect
import io
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from PIL import Image
from synthetic import drawn_of, frame_of, rated, synthetic

from emonb import figures, tables
from emonb.data import TAXONOMIES
from emonb.metrics import calibration_error, reliability
from emonb.predictions import MAIN, QUARTET, first_seed, joint, model_color, model_name, select_examples
from emonb.settings import load_settings

LABELS = TAXONOMIES["mikels8"].labels
ODD, ODD_LABELS = "$x$ <b>_{y", ("a$b$", "$\\bad$", "<i>c")  # names that look like formulas and markup
TITLES = ("mini-fi (drawn)", ODD)
KAPPAS = pd.DataFrame([[1, 0.25, -0.001], [0.25, 1, 0.5], [-0.001, 0.5, 1]], QUARTET[:3], QUARTET[:3])
COUNTS = ["both_right", "only_VLM_right", "only_ViT_right", "neither_right"]


@pytest.fixture(scope="module")
def world():
    """Predictions of two datasets, the settings, and both datasets' joint answers by title."""
    found = synthetic(("mini-fi",), n=120)
    rng, truth = np.random.default_rng(0), [ODD_LABELS[i % 3] for i in range(60)]
    for model in [model for _, model in found if model != "vlm_generated"]:
        answers = [t if rng.uniform() < 0.6 else ODD_LABELS[rng.integers(3)] for t in truth]
        found[ODD, model] = frame_of(answers, truth, ODD_LABELS, rng=rng)
    settings = load_settings("smoke").model_copy(update={"datasets": ("mini-fi", ODD)})  # no name that a run takes
    return found, settings, {title: joint(found, d) for title, d in zip(TITLES, settings.datasets, strict=True)}


def cost_of():
    """Made-up costs and accuracies."""
    k = np.arange(5, 10)
    cost = {"model": [*QUARTET, "vit_scratch"], "parameters": 10**k, "ms_low": 1.5 * k, "ms_median": 2.0 * k}
    cost |= {"ms_high": 4.0 * k, "n": 60, "seeds": 3, "accuracy": 50, "low": 45, "high": 56}
    return pd.concat([pd.DataFrame(cost).assign(dataset=title) for title in TITLES])


def trust_of():
    """A made-up table `gate_trust`."""
    shares = {"n": 20, "followed_vlm": 30.0, "followed_head": 50.0, "followed_neither": 20.0}
    shares |= {"vlm_right": 40.0, "head_right": 35.0, "gate_right": 45.0}
    return pd.DataFrame([{"dataset": t, "emotion": e, **shares} for t in TITLES for e in ("all", *ODD_LABELS)])


@pytest.fixture(scope="module")
def made(world):
    """Every figure, of both datasets where it takes several."""
    found, settings, answers = world
    table, odd = tables.complementarity(found, settings), {m: found[ODD, m] for m in MAIN}
    examples = select_examples(answers[ODD], 2)
    raters = tables.label_distribution(found, settings, {"mini-fi": rated("mini-fi", 120)})
    pictures = [np.full((8, 8, 3), i, np.uint8) for i in range(len(examples))]
    rng, row = np.random.default_rng(0), {"split": "val", "metric": "loss"}
    history = [{**row, "epoch": e, "value": e + k, "seed": k} for e in (1, 2, 3) for k in (0, 2)]
    weights = {TITLES[0]: (LABELS, rng.normal(size=(8, 16))), ODD: (ODD_LABELS, rng.normal(size=(3, 6)))}
    drawn = drawn_of(found, ("mini-fi",))
    levels = tables.main(found, settings, drawn)
    first = {(t, m): first_seed(found[d, m]) for t, d in zip(TITLES, settings.datasets, strict=True) for m in QUARTET}
    return {
        "confusion": figures.confusion(odd["vit"], ODD),
        "confusion_difference": figures.confusion_difference(odd["vit"], odd["head"], ODD),
        "complementarity_venn": figures.complementarity_venn(table),
        "complementarity_by_emotion": figures.complementarity_by_emotion(table),
        "complementarity_upset": figures.complementarity_upset(answers),
        "agreement": figures.agreement(dict.fromkeys(TITLES, KAPPAS), dict.fromkeys(TITLES, 60)),
        "qualitative_examples": figures.qualitative_examples(examples, pictures, ODD, 60),
        "gate_weights": figures.gate_weights(weights),
        "gate_trust": figures.gate_trust(trust_of()),
        "calibration": figures.calibration(first),
        "certainty": figures.certainty(pd.concat([raters, raters.assign(dataset=ODD)])),
        "accuracy_cost": figures.accuracy_cost(cost_of(), levels),
        "evidence": figures.evidence(tables.evidence(found, settings, drawn)),
        "alpha_tradeoff": figures.alpha_tradeoff(tables.alpha(found, settings), levels),
        "depth": figures.depth(tables.depth(found, settings), levels),
        "training_curves": figures.training_curves({("head", t): history for t in TITLES}),
        "answer_bars": figures.answer_bars(pictures[0], {"vit": {ODD_LABELS[1]: 1, "x": 0}}, "x", ODD),
    }


def words(fig):
    """All visible text of a figure, tick labels included: those exist only once it is drawn."""
    FigureCanvasAgg(fig).draw()
    return "\n".join(t.get_text() for t in fig.findobj(Text) if t.get_visible())


def cells(ax, rows):
    return ax.collections[0].get_array().reshape(rows, -1)


def test_names_are_no_formulas_and_text_is_readable_in_print(made):
    public = {n: f for n, f in inspect.getmembers(figures, inspect.isfunction) if n[0] != "_"}
    drawing = {n for n, f in public.items() if str(f.__annotations__.get("return")).startswith("Figure")}
    assert drawing == set(made)
    for figure, fig in made.items():
        assert figure == "evidence" or ODD in words(fig).replace("\n", " "), figure  # drawn, and as it is
        texts = [t for t in fig.findobj(Text) if t.get_visible() and t.get_text()]
        assert not [t.get_text() for t in texts if t.get_parse_math() and "$" in t.get_text()], figure
        assert min(t.get_fontsize() for t in texts) >= figures.NOTE, figure
        assert fig.get_size_inches()[0] <= figures.FULL, figure
        if figure in ("confusion", "gate_weights", "gate_trust", "complementarity_by_emotion"):
            assert all(label in words(fig) for label in ODD_LABELS)


def test_confusion_shows_all_labels_counts_and_basis(world, made):
    frame = world[0]["mini-fi", "emovlmkd"]
    ax = figures.confusion(frame, "EmoVLM-KD").axes[0]
    first = first_seed(frame)
    want = pd.crosstab(first["label"], first["prediction"]).reindex(index=LABELS, columns=LABELS, fill_value=0)
    share = 100 * want.div(want.sum(axis=1), axis=0)
    assert np.allclose(cells(ax, 8), share)
    notes = [t.get_text() for t in ax.texts]
    assert notes[18] == f"{share.iloc[2, 2]:.0f}\n{want.iloc[2, 2]}"
    assert tuple(t.get_text() for t in ax.get_yticklabels()) == LABELS
    same = frame.groupby("image_id")["prediction"].nunique().eq(1).mean()
    assert ax.get_title() == f"EmoVLM-KD\nn = 120 images, first of 3 seeds; all seeds agree on {same:.0%}"
    free = figures.confusion(world[0]["mini-fi", "vlm_generated"], "generated").axes[0]
    assert [t.get_text() for t in free.get_xticklabels()][-1] == "(unparsable)"


def test_difference_is_in_points_on_common_images(world):
    a, b = world[0]["mini-fi", "emovlmkd"], world[0]["mini-fi", "vlm_tuned"].iloc[:96]
    ax = figures.confusion_difference(a, b, "a minus b").axes[0]
    common = (first_seed(a[a["image_id"].isin(b["image_id"])]), b)
    counts = [pd.crosstab(f["label"], f["prediction"], normalize="index") for f in common]
    want = 100 * np.subtract(*(c.reindex(index=LABELS, columns=LABELS, fill_value=0).to_numpy() for c in counts))
    assert np.allclose(cells(ax, 8), want)
    low, high = ax.collections[0].get_clim()
    assert low == -high == -np.abs(want).max(), "zero is the colour in the middle"
    assert [t.get_text() for t in ax.texts] == [f"{x:+.0f}" if x.round() else "" for x in want.ravel()]
    assert "n = 96 images, first seed of each" in ax.get_title()


def test_circles_bars_and_kappas_show_the_table(made, world):
    table = tables.complementarity(*world[:2])
    whole = table[table["emotion"] == "all"].to_dict("records")
    for ax, row in zip(made["complementarity_venn"].axes, whole, strict=True):
        about = f"{row['dataset']}\nn = {row['n']} images, first seed\nboth right: {row['both_right']} "
        assert ax.get_title().startswith(about)
        assert f"neither right: {row['neither_right']} (" in ax.get_title()
        assert {str(row[column]) for column in COUNTS[:3]} <= {t.get_text() for t in ax.texts}
    part = table[table["dataset"] == TITLES[0]]
    ax = made["complementarity_by_emotion"].axes[0]
    widths = np.reshape([bar.get_width() for bar in ax.patches], (4, 9))
    assert np.allclose(widths.T, 100 * part[COUNTS].div(part["n"], axis=0))
    assert [t.get_text() for t in ax.get_yticklabels()] == ["all (120)", *(f"{e} (15)" for e in LABELS)]
    assert [t.get_text() for t in made["agreement"].axes[0].texts if t.get_text()] == [".25", ".00", ".50"]


@pytest.mark.parametrize("counts", [(0, 0, 0, 9), (4, 0, 5, 0), (9, 0, 0, 0)])
def test_circles_of_odd_counts_are_drawn(counts):
    table = pd.DataFrame([{"dataset": "d", "emotion": "all", "n": 9, **dict(zip(COUNTS, counts, strict=True))}])
    assert f"only tuned VLM right: {counts[1]} (" in words(figures.complementarity_venn(table))


def test_upset_bars_and_ticks_are_the_intersections(made, world):
    *axes, dots = made["complementarity_upset"].axes
    assert [t.get_text() for t in dots.get_yticklabels()] == [model_name(m) for m in QUARTET]
    right = cells(dots, 4).astype(bool)
    for ax, table in zip(axes, world[2].values(), strict=True):
        hits = table[list(QUARTET)].eq(table["label"], axis=0)
        for bar, combination, text in zip(ax.patches, right.T, ax.texts, strict=True):
            n = (hits == combination).all(axis=1).sum()
            assert (bar.get_height(), text.get_text()) == (pytest.approx(100 * n / len(table)), str(n))
            assert (bar.get_facecolor()[:3] == to_rgb(model_color("emovlmkd"))) == combination[3]
        assert sum(int(t.get_text()) for t in ax.texts) == len(table)


def test_alpha_depth_and_cost_put_each_point_in_its_place(made, world):
    alpha, table = made["alpha_tradeoff"].axes[0], tables.depth(*world[:2])
    assert sorted(t.get_text() for t in alpha.texts[:5]) == ["0", "0.25", "0.5", "0.75", "1"]
    assert alpha.get_title() == made["depth"].axes[0].get_title() == "mini-fi (drawn)\nn = 120 images, 3 seeds"
    ours = table.query("dataset == 'mini-fi (drawn)' and ours == ours")["ours"]
    assert made["depth"].axes[0].lines[0].get_ydata().tolist() == ours.tolist()
    above, _, below, _ = made["accuracy_cost"].axes
    assert above.containers[2].lines[0].get_xydata().tolist() == [[10**7, 50]]
    assert below.containers[2].lines[0].get_xydata().tolist() == [[14, 50]]
    across, up = (lines.get_segments()[0] for lines in below.containers[2].lines[2])
    assert (across[:, 0].tolist(), up[:, 1].tolist()) == (pytest.approx([10.5, 28]), [45, 56])
    assert all(text in words(made["accuracy_cost"]) for text in ("tuned VLM", "10 M", "n = 60 images, 3 seeds"))


def test_evidence_points_are_the_table_and_lines_are_chance_and_ceiling(made, world):
    found, settings, _ = world
    table = tables.evidence(found, settings, drawn_of(found, ("mini-fi",))).query("dataset == 'all'")
    left, right = made["evidence"].axes
    for row, place in ((QUARTET[0], left.containers[0]), ("inherited", right.containers[0])):
        want = table[(table["row"] == row) & (table["evidence"] != "no false mood")].set_index("evidence")["value"]
        assert place.lines[0].get_ydata().tolist() == want[["content", "mood", "both", "all"]].tolist()
        assert place.lines[0].get_color() == (model_color(row) or "black")
    heights = {line.get_label(): line.get_ydata()[0] for line in made["accuracy_cost"].axes[0].lines}
    assert heights["ceiling set by label noise"] == 90, "one label in ten is noise"
    assert heights["always the most frequent emotion"] == 12.5
    assert "ceiling set by label noise" in [text.get_text() for text in made["accuracy_cost"].legends[0].get_texts()]


def test_axes_show_a_few_points_and_no_note_leaves_them_or_lies_on_another():
    rows, levels = [], pd.DataFrame({"dataset": [*TITLES], "chance": 12.5, "ceiling": 61.0})
    for title, close in zip(TITLES, ([61, 64], [64, 61]), strict=True):
        table = pd.DataFrame({"alpha": [1, 0.75, 0.5, 0.25, 0], "ours": [*close, 65, 63, 64]})
        about = {"row": ["other", "other", "head", "other", "other"], "dataset": title, "n": 9, "seeds": 3}
        about |= {"kl": [0.0183, 0.019, 0.023, 0.027, 0.045]}
        rows.append(table.assign(ci_low=table["ours"] - 2, ci_high=table["ours"] + 2, **about))
    fig = figures.alpha_tradeoff(pd.concat(rows), levels)
    renderer = FigureCanvasAgg(fig).get_renderer()
    for ax in fig.axes:
        low, high = ax.get_ylim()
        assert (low < 59, high > 67, high - low < 25) == (True, True, True), "intervals fill the axis"
        assert [text.get_text() for text in ax.texts][-1] == "most frequent emotion: 12.5 ↓"
        assert [line.get_ydata()[0] for line in ax.lines if line.get_linestyle() == "--"] == [61], "within the axis"
        boxes = [text.get_window_extent(renderer) for text in ax.texts]
        bars = [Bbox(ax.transData.transform(ends)) for ends in ax.collections[0].get_segments()]
        assert all(ax.bbox.padded(1).fully_contains(*corner) for box in boxes for corner in box.corners())
        assert not [1 for i, box in enumerate(boxes) if box.count_overlaps([*bars, *boxes[i + 1 :]])]


def test_gate_weights_and_trust_are_their_tables(made, world):
    half = np.array([[3.0, 1.0, 0.0], [0.0, 2.0, 0.0], [1.0, -1.0, 5.0]])
    assert figures.lift(half).tolist() == [2.5, 2.0, 5.0]
    assert np.allclose(figures.lift(half + np.array([10, -4, 7])), figures.lift(half)), "what a softmax ignores"
    field, bars = made["gate_weights"].axes[:2]
    matrix = np.random.default_rng(0).normal(size=(8, 16))
    assert np.allclose(cells(field, 8), matrix)
    lifts = [*figures.lift(matrix[:, :8]), *figures.lift(matrix[:, 8:])]
    assert [p.get_width() for p in bars.patches] == pytest.approx(lifts)
    shown, ax = trust_of().query("dataset == @TITLES[0]"), made["gate_trust"].axes[0]
    ends = [*shown["followed_vlm"], *(100 - shown["followed_head"]), *([100] * len(shown))]
    assert [p.get_x() + p.get_width() for p in ax.patches] == pytest.approx(ends)
    marks = [np.asarray(marks.get_offsets())[:, 0] for marks in ax.collections]
    assert np.allclose(marks, [shown["vlm_right"], 100 - shown["head_right"]])
    assert ax.get_title().endswith(f"n = {shown['n'].iloc[0]} images, first seed")


def test_certainty_has_a_bar_a_model_and_the_raters_line(made, world):
    table = tables.label_distribution(world[0], world[1], {"mini-fi": rated("mini-fi", 120)})
    ax, table = made["certainty"].axes[0], table[table["row"].isin(MAIN)]
    assert [bar.get_width() for bar in ax.patches] == pytest.approx(table["surest"].tolist())
    ends = np.array([segment[:, 0] for segment in ax.collections[0].get_segments()])
    assert np.allclose(ends, table[["surest_low", "surest_high"]]), "the intervals are those of the table"
    assert ax.lines[-1].get_xdata()[0] == pytest.approx(2 / 3)


def test_calibration_curves_and_examples(made, world):
    frame, ax = first_seed(world[0]["mini-fi", "emovlmkd"]), made["calibration"].axes[3]
    assert np.allclose(ax.collections[-1].get_offsets(), reliability(frame)[["confidence", "accuracy"]])
    assert ax.get_title() == f"mini-fi (drawn)\nEmoVLM-KD\nn = 120, ECE {calibration_error(frame):.1f} %"
    curve = made["training_curves"].axes[0]
    assert curve.get_title() == "distilled head\nval loss; seeds: 2"
    assert curve.lines[0].get_ydata().tolist() == [2, 3, 4]
    steep = [{"epoch": e, "split": "train", "metric": "loss", "value": 9**-e} for e in range(4)]
    assert figures.training_curves({("x", "d"): steep}).axes[0].get_yscale() == "log"
    scores = [{"epoch": e, "split": "val", "metric": m, "value": 60.0} for e in (1, 2) for m in ("loss", "accuracy")]
    curves = {("adapter", "d"): steep, ("head", "d"): scores}
    first, loss, accuracy = figures.training_curves(curves, chance=[50.0, 25.0, 50.0]).axes
    assert first.get_title() == "tuned VLM (LoRA)\ntrain loss; seeds: 1"
    assert len({ax.get_position().y0 for ax in (loss, accuracy)}) == 1, "side by side"
    drawn = {to_rgb(line.get_color()) for ax in (first, loss) for line in ax.lines}
    assert not drawn & {to_rgb(model_color(model)) for model in MAIN}, "a dataset has no model's colour"
    levels = [sorted(x.get_ydata()[0] for x in ax.lines if x.get_linestyle() == ":") for ax in (loss, accuracy)]
    assert levels == [[], [25, 50]]
    fig, examples = made["qualitative_examples"], select_examples(world[2][ODD], 2)
    assert [image.get_array()[0, 0, 0] for ax in fig.axes for image in ax.images] == list(range(len(examples)))
    right = examples[["vlm_tuned", "vit", "emovlmkd"]].eq(examples["label"], axis=0).to_numpy().sum()
    assert words(fig).count("✓") == right
    noisy = examples.assign(drawn_as=examples["label"].where(np.arange(len(examples)) > 0, "other"), emovlmkd="other")
    marked = figures.qualitative_examples(noisy, [np.zeros((4, 4, 3))] * len(noisy), "x", 60)
    assert "label noise: " in marked.axes[0].get_title()
    assert words(marked).count("(✓) EmoVLM-KD: other") == words(marked).count("(✓): as drawn") == 1, "so not wrong"
    one = figures.qualitative_examples(examples[examples["case"] == "vlm"], [np.zeros((4, 4, 3))] * 2, "x", 60)
    assert words(one).count("; no ") == 3


def test_answer_bars_mark_the_answer_by_form_and_the_model_by_colour():
    p = {"vlm_tuned": {"awe": 0.2, "fear": 0.8}, "tau 8": {"awe": 0.6, "fear": 0.4}}
    fig = figures.answer_bars(Image.new("RGB", (30, 20)), p, truth="awe")
    assert [ax.get_title() for ax in fig.axes] == ["the label says:\nawe ◂", "tuned VLM\nfear ✗", "tau 8\nawe ✓"]
    bars = fig.axes[1].patches
    assert [bar.get_edgecolor() == (0, 0, 0, 1) for bar in bars] == [False, True]
    assert {bar.get_facecolor()[:3] for bar in bars} == {to_rgb(model_color("vlm_tuned"))}
    assert [ax.lines[0].get_ydata().tolist() for ax in fig.axes[1:]] == [[0], [0]], "a triangle at what the label says"
    assert "✗" not in words(figures.answer_bars(Image.new("RGB", (30, 20)), p))
    assert len({model_color(m) for m in MAIN}) == len(set(figures.MARKERS.values())) == len(MAIN)


def test_nothing_to_show_is_said(world):
    nothing, alone = tables.complementarity({}, world[1]), KAPPAS.iloc[:1, :1]
    made = [figures.complementarity_venn(nothing), figures.complementarity_by_emotion(nothing)]
    made += [figures.complementarity_upset({}), figures.agreement({"x": alone}, {"x": 1}), figures.calibration({})]
    made += [figures.gate_trust(trust_of().iloc[:0]), figures.accuracy_cost(cost_of().iloc[:0], nothing)]
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
    assert (png.data[:4], jpeg.data[:2], png.metadata["alt"]) == (b"\x89PNG", b"\xff\xd8", "heads")
    assert len(png.data) < 60_000
    assert not sys.modules["matplotlib.pyplot"].get_fignums()
    shown = np.asarray(Image.open(io.BytesIO(figures.as_image(made["accuracy_cost"], "costs").data)).convert("RGB"))
    for model in {*cost_of()["model"]} & {*MAIN}:  # marks of a few pixels
        apart = np.abs(shown - 255 * np.array(to_rgb(model_color(model)))).max(axis=2)
        assert (apart <= 8).sum() >= 20, f"{model} has lost its colour"
