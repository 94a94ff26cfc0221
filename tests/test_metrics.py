"""Measures against values computed by hand or by the plain definition in float64."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon
from scipy.stats import binom, chi2, ttest_1samp
from synthetic import frame_of, synthetic

from emonb import metrics
from emonb.predictions import make_predictions

LABELS = ["positive", "negative"]
A = [True] * 6 + [True] * 3 + [False] * 1 + [False] * 2  # both 6, only a 3, only b 1, neither 2
B = [True] * 6 + [False] * 3 + [True] * 1 + [False] * 2


def frame(answers, truth, **options):
    return frame_of(answers, truth, LABELS, **options)


def test_accuracy_is_percent_and_seeds_of_one_image_are_averaged_first():
    truth, answers = ["positive"] * 3 + ["negative"], ["positive", "positive", "negative", "negative"]
    first, second = frame(truth, truth, parsed=[True, True, True, False]), frame(answers, truth, seed=1)
    assert metrics.accuracy(first) == metrics.accuracy(second) == 75
    both = pd.concat([first, second, first.assign(split="val", image_id="other")])
    right = metrics.correctness({("x", "a"): both, ("x", "b"): first[:2], ("y", "a"): first}, "x", "abc")
    assert right["a"].tolist() == [1.0, 1.0, 0.5, 0.5], "test images only"
    assert right["b"].dropna().tolist() == [1.0, 1.0]
    assert right["c"].isna().all(), "no predictions"


def test_repeats_are_averaged_within_their_seed():
    truth = ["positive", "negative"]
    again = frame(["negative", "negative"], truth).assign(repeat=1)
    both = pd.concat([frame(truth, truth), again, frame(truth, truth, seed=1)])
    assert metrics.hits_by_seed(both).to_numpy().tolist() == [[0.5, 1.0], [1.0, 1.0]]


def test_label_distribution_measures_by_hand():
    raters = np.array([[0.5, 0.5, 0.0], [3.0, 1.0, 0.0], [0.2, 0.2, 0.6]])  # the second is normalised here
    model = np.array([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7], [0.3, 0.5, 0.2]])
    found = metrics.label_distribution(raters, model)
    assert found["kl"][0] == pytest.approx(0.5 * np.log(2))
    assert found["kl"][1] == pytest.approx(0.75 * np.log(7.5) + 0.25 * np.log(1.25))
    assert found["js"].tolist() == pytest.approx((jensenshannon(raters, model, axis=1) ** 2).tolist())
    assert found["chebyshev"].tolist() == pytest.approx([0.25, 0.7, 0.4])
    assert found["cosine"][0] == pytest.approx(0.375 / np.sqrt(0.5 * 0.375))
    assert found["top2"].tolist() == [100, 0, 100], "of a tie for the second place each counts"
    agreed = metrics.label_distribution(np.array([[1.0, 0, 0]] * 2), np.array([[0.5, 0.3, 0.2], [0.3, 0.5, 0.2]]))
    assert agreed["top2"].tolist() == [100, 0], "what nobody gave is no second place"


def test_unpaired_seeds_are_compared_with_the_other_s_mean():
    a, b = (pd.DataFrame({s: [s, s + 1.0] for s in seeds}, index=["x", "y"]) for seeds in ((1, 2), (3, 7)))
    assert metrics.difference(a, b).tolist() == [[-4, -3], [-4, -3]]
    assert metrics.difference(a[[1]], b).tolist() == [[-2, -6], [-2, -6]]
    assert metrics.difference(a, a + 1).tolist() == [[-1, -1], [-1, -1]]


def test_bootstrap_equals_plain_resampling():
    values = np.random.default_rng(3).choice([0, 1 / 3, 2 / 3, 1], size=80)
    fast = metrics.bootstrap_means(values, 20_000, seed=1)
    draws = np.random.default_rng(2).integers(80, size=(20_000, 80))
    plain = values[draws].mean(axis=1)
    assert fast.mean() == pytest.approx(values.mean(), abs=0.002)
    assert fast.std() == pytest.approx(values.std() / np.sqrt(80), rel=0.03)  # the textbook standard error
    assert np.percentile(fast, [2.5, 97.5]) == pytest.approx(np.percentile(plain, [2.5, 97.5]), abs=0.01)


def test_bootstrap_is_seeded_chunked_and_keeps_rows_together(monkeypatch):
    values = np.random.default_rng(0).normal(size=(50, 2))
    whole = metrics.bootstrap_means(values, 100, seed=5)
    assert not np.array_equal(whole, metrics.bootstrap_means(values, 100, seed=6))
    monkeypatch.setattr(metrics, "CHUNK", 50 * 7)
    assert np.allclose(whole, metrics.bootstrap_means(values, 100, seed=5))
    twins = metrics.bootstrap_means(np.column_stack([values[:, 0], -values[:, 0]]), 100)
    assert np.allclose(twins[:, 0], -twins[:, 1])


def test_paired_interval_is_narrower_than_unpaired_and_of_common_images():
    found = synthetic(("mini-fi",), n=400, models=("vit", "vlm_tuned"))
    right = 100 * metrics.correctness(found, "mini-fi", ("vlm_tuned", "vit"))
    value, low, high = metrics.mean_interval(right["vlm_tuned"] - right["vit"])
    assert value == pytest.approx(np.subtract(*(metrics.accuracy(found["mini-fi", m]) for m in right)))
    alone = [metrics.mean_interval(right[m]) for m in right]
    assert high - low < np.hypot(*(upper - lower for _, lower, upper in alone))
    assert metrics.mean_interval(right["vit"] - right["vit"]) == (0, 0, 0)
    assert np.isnan(metrics.mean_interval(right["vit"][:0])).all(), "no images"


def test_statistics_of_pairs_by_hand():
    assert metrics.two_by_two(A, B).tolist() == [[6, 3], [1, 2]]
    assert metrics.q_statistic(A, B) == pytest.approx((6 * 2 - 3 * 1) / (6 * 2 + 3 * 1))
    assert np.isnan(metrics.q_statistic([True], [True]))
    assert metrics.kappa(["x"] * 5 + ["y"] * 5, ["x"] * 4 + ["y"] * 6) == pytest.approx((0.9 - 0.5) / (1 - 0.5))
    assert metrics.kappa(["x"] * 3, ["x"] * 3) == 1
    assert metrics.mcnemar_p(np.subtract(A, B, dtype=float)) == pytest.approx(2 * binom.cdf(1, 4, 0.5))  # 3 against 1
    assert metrics.mcnemar_p(np.repeat([100, -100], [40, 20])) == pytest.approx(chi2.sf((40 - 20 - 1) ** 2 / 60, 1))
    assert metrics.mcnemar_p(np.zeros(9)) == 1
    assert np.isnan(metrics.mcnemar_p(np.zeros(0)))


def test_error_consistency_by_hand_and_its_ends():
    value, low, high = metrics.error_consistency(*np.array([A, B], float))
    observed, expected = (6 + 2) / 12, 9 / 12 * 7 / 12 + 3 / 12 * 5 / 12
    assert value == pytest.approx((observed - expected) / (1 - expected))
    assert low < value < high
    assert metrics.error_consistency(np.array(A), np.array(A))[0] == pytest.approx(1)
    assert metrics.error_consistency(np.array([1, 0, 1, 0]), np.array([1, 1, 0, 0]))[0] == pytest.approx(0)
    for pair in (([1.0, 0.0], [np.nan, 1.0]), ([1, 1], [1, 1]), ([], [])):
        assert np.isnan(metrics.error_consistency(*map(np.array, pair))).all()


@settings(max_examples=30, deadline=None)
@given(st.floats(0.5, 5), st.integers(0, 99))
def test_tempering_probabilities_is_tempering_logits(tau, seed):
    z, w = np.random.default_rng(seed).normal(scale=4, size=(2, 7, 8))
    softmax = [np.exp(x) / np.exp(x).sum(1, keepdims=True) for x in (z, z / tau, w, w / tau)]
    plain = (softmax[1] * np.log(softmax[1] / softmax[3])).sum(1)
    assert np.allclose(metrics.kl_divergence(softmax[0], softmax[2], tau), plain)
    p = np.array([[1.0, 0.0], [0.5, 0.5]])  # underflown
    assert np.isfinite(metrics.kl_divergence(p, p[::-1], tau)).all()
    assert np.allclose(metrics.kl_divergence(p, p, tau), 0)


def test_kl_joins_by_name_not_by_position():
    found = synthetic(("mini-fi",), n=40, models=("vit", "head"))
    teacher, head = found["mini-fi", "vit"], found["mini-fi", "head"]
    kl = metrics.kl_by_seed(teacher.sample(frac=1, random_state=1), head.sample(frac=1, random_state=2), 2)
    one, p = (f.loc[f["image_id"] == kl.index[3]].filter(like="p_").to_numpy() for f in (head, teacher))
    by_hand = [metrics.kl_divergence(p, one[[i]], 2)[0] for i in range(3)]
    assert sorted(kl.iloc[3]) == pytest.approx(sorted(by_hand))


def test_intervals_of_crossed_images_and_seeds_cover_what_they_should():
    """Differences of two samples: luck of 300 images, of three seeds, and of both together."""
    rng, hits, wide = np.random.default_rng(0), {"a": 0, "b": 0, "all": 0}, []
    for _ in range(400):
        luck = {name: rng.normal(scale=2, size=3) for name in "ab"}
        samples = {n: rng.normal(scale=20, size=(300, 1)) + luck[n] + rng.normal(scale=9, size=(300, 3)) for n in "ab"}
        found = metrics.crossed_estimates(samples)
        for name, one in found.items():
            low, high = one.interval()
            hits[name] += low <= 0 <= high
        plain = samples["a"].mean(axis=1)
        wide.append(found["a"].error / (plain.std(ddof=1) / np.sqrt(300)))
    assert all(0.93 <= count / 400 <= 0.99 for count in hits.values()), hits
    assert np.mean(wide) > 1.3, "images alone would be too sure"


def test_crossed_estimates_by_hand_and_with_one_seed():
    x = np.array([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0], [1.0, 1.0]])
    one = metrics.crossed_estimates({"x": x})["x"]
    image, seed = x.mean(1).var(ddof=1) / 4, x.mean(0).var(ddof=1) / 2
    assert one.error == pytest.approx(np.sqrt(image + seed))
    assert one.freedom == pytest.approx((image + seed) ** 2 / (image**2 / 3 + seed**2))
    assert (one.value, one.images, one.seeds) == (0.625, 4, 2)
    low, high = metrics.crossed_estimates({"x": x[:, :1]})["all"].interval()
    assert (low, high) == pytest.approx(ttest_1samp(x[:, 0], 0).confidence_interval())


def test_hits_where_the_other_errs_against_those_by_chance():
    """Of 8 errors of a, b answers 4 rightly; permuted over these images, its answers hit as often as labels meet."""
    gold = ["joy"] * 4 + ["fear"] * 4 + ["joy"] * 4
    a = frame_of(["fear"] * 4 + ["joy"] * 4 + ["joy"] * 4, gold, ["joy", "fear"])
    b = frame_of(["joy"] * 4 + ["joy"] * 4 + ["fear"] * 4, gold, ["joy", "fear"])
    assert not metrics.excess_hits(a, b).any(), "who always says joy knows nothing"
    assert metrics.permutation_p(a, b, 100) == 1
    knows = frame_of(gold, gold, ["joy", "fear"])
    assert metrics.excess_hits(a, knows).mean() == pytest.approx(100 * (8 - 4) / 12)
    assert metrics.permutation_p(a, knows, 2000) == pytest.approx(1 / 70, abs=0.01)  # of 8 over 4 ways
    assert metrics.excess_hits(a, a).mean() < 0, "a model does not complement itself"
    twice = pd.concat([a, knows.assign(seed=1)], ignore_index=True)
    by_seed = metrics.excess_hits(twice, pd.concat([knows, a.assign(seed=1)], ignore_index=True))
    assert by_seed.mean(axis=0) == pytest.approx([100 / 3, 0]), "the second a makes no errors"


def test_each_image_s_part_in_the_excess_is_what_leaving_it_out_changes():
    rng, n, labels = np.random.default_rng(0), 200, ["joy", "fear", "awe"]
    gold, ours, theirs = (rng.choice(labels, n) for _ in range(3))
    theirs = np.where(rng.random(n) < 0.3, gold, theirs)

    def parts(keep):
        return metrics.excess_hits(*(frame_of(said[keep], gold[keep], labels) for said in (ours, theirs)))[:, 0]

    whole = parts(np.ones(n, bool))
    left_out = np.array([parts(np.arange(n) != i).mean() for i in range(n)])
    assert whole.mean() + (n - 1) * (whole.mean() - left_out) == pytest.approx(whole, abs=1.5)
    assert len(whole) * left_out.var() * (n - 1) / n == pytest.approx(whole.var() / n, rel=0.05)


def said(sure, right):
    """A frame of two emotions: confidence of each answer, and whether it is right."""
    label, p = ["joy" if hit else "fear" for hit in right], np.array([[s, 1 - s] for s in sure])
    return make_predictions(range(len(p)), ["test"] * len(p), label, p, ["joy", "fear"])


def test_bins_counted_by_hand():
    """Three of four right at 0.9, one of two at 0.6: gaps 0.15 and 0.1; a bin ends with its upper edge."""
    frame = said([0.9] * 4 + [0.6] * 2, [1, 1, 1, 0, 1, 0])
    assert np.allclose(metrics.reliability(frame)[["n", "confidence", "accuracy"]], [[2, 0.6, 0.5], [4, 0.9, 0.75]])
    assert metrics.calibration_error(frame) == pytest.approx(100 * (2 * 0.1 + 4 * 0.15) / 6)
    edges = metrics.reliability(said([0.6, 0.601, 1.0], [1, 1, 1]), bins=5)
    assert np.allclose(edges[["low", "high"]], [[0.4, 0.6], [0.6, 0.8], [0.8, 1.0]])


def test_scores_of_probabilities_by_hand_and_of_what_is_known():
    """Brier and NLL of two answers; the calibration error of a model 10 points too sure, and of a perfect one."""
    two = metrics.probability_scores(said([0.9, 0.6], [1, 0]))
    assert two["brier"][0] == pytest.approx((0.1**2 + 0.1**2 + 0.6**2 + 0.6**2) / 2)
    assert two["nll"][0] == pytest.approx(-(np.log(0.9) + np.log(0.4)) / 2)
    assert metrics.probability_scores(said([1.0], [0]))["nll"][0] == pytest.approx(-np.log(np.finfo("float32").eps))
    rng, found = np.random.default_rng(0), []
    for much in [0.0, 0.1] * 12:
        sure = rng.uniform(0.6, 0.9, 400)
        frame = said(sure, rng.random(400) < sure - much)
        found.append((*metrics.probability_scores(frame, 100)["debiased"], metrics.calibration_error(frame)))
    perfect, off = np.array(found[::2]), np.array(found[1::2])  # [12, 4]
    assert np.sqrt(np.mean(off[:, 0] ** 2)) == pytest.approx(10, abs=1.5)
    assert ((off[:, 1] <= 10) & (off[:, 2] >= 10)).mean() >= 0.9
    assert np.median(perfect[:, 0]) < 0.6 * np.median(perfect[:, 3]), "what chance adds is taken away"
    assert (perfect[:, 1] == 0).all()
