"""Measures against values computed by hand or by the plain definition in float64."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom
from synthetic import frame_of, synthetic

from emonb import metrics

LABELS = ["positive", "negative"]
A = [True] * 6 + [True] * 3 + [False] * 1 + [False] * 2  # both 6, only a 3, only b 1, neither 2
B = [True] * 6 + [False] * 3 + [True] * 1 + [False] * 2


def frame(answers, truth, **options):
    return frame_of(answers, truth, LABELS, **options)


def test_accuracy_is_percent():
    truth = ["positive"] * 3 + ["negative"]
    answers = frame(["positive", "positive", "negative", "negative"], truth)
    assert metrics.accuracy(answers) == 75


def test_unparsable_lowers_accuracy_and_is_no_class():
    truth = ["positive"] * 4
    answers = frame(truth, truth, parsed=[True, True, True, False])
    assert metrics.accuracy(answers) == 75


def test_seeds_of_one_image_are_averaged_first():
    truth = ["positive", "positive"]
    first, second = frame(truth, truth, seed=0), frame(["positive", "negative"], truth, seed=1)
    correct = metrics.correct_by_image(pd.concat([first, second]))
    assert correct.tolist() == [1.0, 0.5]


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
    assert np.array_equal(whole, metrics.bootstrap_means(values, 100, seed=5))
    assert not np.array_equal(whole, metrics.bootstrap_means(values, 100, seed=6))
    monkeypatch.setattr(metrics, "_CHUNK", 50 * 7)
    assert np.allclose(whole, metrics.bootstrap_means(values, 100, seed=5))
    twins = metrics.bootstrap_means(np.column_stack([values[:, 0], -values[:, 0]]), 100)
    assert np.allclose(twins[:, 0], -twins[:, 1])


def test_interval_covers_the_truth_about_as_often_as_it_says():
    rng, hits = np.random.default_rng(0), 0
    for i in range(300):
        values = (rng.uniform(size=200) < 0.6).astype(float)
        found = metrics.interval(values.mean(), metrics.bootstrap_means(values, 400, seed=i), 0.9)
        hits += found.low <= 0.6 <= found.high
    assert 0.84 < hits / 300 < 0.95


def test_paired_interval_is_narrower_than_unpaired_and_of_common_images():
    predictions = synthetic(("mini-fi",), n=400, models=("vit", "vlm_tuned"))
    a, b = predictions["mini-fi", "vlm_tuned"], predictions["mini-fi", "vit"]
    found = metrics.paired_interval(a, b)
    assert found.value == pytest.approx(metrics.accuracy(a) - metrics.accuracy(b))
    alone = [metrics.accuracy_interval(x) for x in (a, b)]
    assert found.high - found.low < np.hypot(*(x.high - x.low for x in alone))
    assert metrics.paired_interval(a, a) == (0, 0, 0)
    half = metrics.paired_correctness(a.iloc[:100], b)
    assert len(half) == 100


def test_two_by_two_and_pair_statistics_by_hand():
    assert metrics.two_by_two(A, B).tolist() == [[6, 3], [1, 2]]
    assert metrics.q_statistic(A, B) == pytest.approx((6 * 2 - 3 * 1) / (6 * 2 + 3 * 1))
    assert metrics.disagreement(A, B) == pytest.approx(4 / 12)
    assert metrics.oracle(A, B) == pytest.approx(10 / 12)
    assert np.isnan(metrics.q_statistic([True], [True]))


def test_mcnemar_exact_and_corrected():
    assert metrics.mcnemar_p(A, B) == pytest.approx(2 * binom.cdf(1, 4, 0.5))  # 3 against 1
    a = np.r_[np.ones(40, bool), np.zeros(20, bool)]
    from scipy.stats import chi2

    assert metrics.mcnemar_p(a, ~a) == pytest.approx(chi2.sf((abs(40 - 20) - 1) ** 2 / 60, 1))
    assert metrics.mcnemar_p(A, A) == 1


def test_kappa_by_hand():
    a, b = ["x"] * 5 + ["y"] * 5, ["x"] * 4 + ["y"] * 6
    assert metrics.kappa(a, b) == pytest.approx((0.9 - 0.5) / (1 - 0.5))
    assert metrics.kappa(["x"] * 3, ["x"] * 3) == 1


@settings(max_examples=30, deadline=None)
@given(st.floats(0.5, 5), st.integers(0, 99))
def test_tempering_probabilities_is_tempering_logits(tau, seed):
    rng = np.random.default_rng(seed)
    z, w = rng.normal(scale=4, size=(2, 7, 8))

    def softmax(x):
        e = np.exp(x - x.max(axis=1, keepdims=True))
        return e / e.sum(axis=1, keepdims=True)

    assert np.allclose(metrics.temper(softmax(z), tau), softmax(z / tau))
    p, q = softmax(z / tau), softmax(w / tau)
    assert np.allclose(metrics.kl_divergence(softmax(z), softmax(w), tau), (p * np.log(p / q)).sum(axis=1))


def test_kl_is_finite_for_underflown_probabilities_and_zero_for_equals():
    p = np.array([[1.0, 0.0], [0.5, 0.5]])
    assert np.isfinite(metrics.kl_divergence(p, p[::-1], 2)).all()
    assert np.allclose(metrics.kl_divergence(p, p, 2), 0)


def test_kl_by_image_joins_by_name_not_by_position():
    found = synthetic(("mini-fi",), n=40, models=("vit", "head"))
    teacher, head = found["mini-fi", "vit"], found["mini-fi", "head"]
    kl = metrics.kl_by_image(teacher, head, 2)
    shuffled = metrics.kl_by_image(teacher.sample(frac=1, random_state=1), head.sample(frac=1, random_state=2), 2)
    assert np.allclose(kl, shuffled)
    one = head[head["image_id"] == kl.index[3]]
    p = metrics.probabilities(teacher[teacher["image_id"] == kl.index[3]])
    by_hand = np.mean([metrics.kl_divergence(p, metrics.probabilities(one.iloc[[i]]), 2)[0] for i in range(3)])
    assert kl.iloc[3] == pytest.approx(by_hand)


def test_either_right_is_the_oracle():
    found = synthetic(("mini-fi",), n=200, models=("vit", "vlm_tuned"))
    a, b = found["mini-fi", "vlm_tuned"], found["mini-fi", "vit"].sample(frac=1, random_state=0)
    hits = metrics.paired_correctness(a, b)
    expected = 100 * metrics.oracle(hits["a"] == 1, hits["b"] == 1)
    assert metrics.accuracy(metrics.either_right(a, b)) == pytest.approx(expected)
