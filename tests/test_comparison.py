"""Error rates of verdicts over simulated sweeps with known truth, and the formulas they rest on."""

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from moe.statistics.comparison import (
    MOST_SEEDS,
    Estimate,
    estimate,
    further_seeds,
    holm,
    verdicts,
)

DELTA = 0.01


def simulated(rng, true, seeds, documents=40, seed_sd=0.004, document_sd=0.03):
    """Paired differences in bits (S, M), bytes (M,): seeds and documents each have their effect."""
    bytes_M = rng.lognormal(7, 1, documents).round() + 1
    effect_SM = true + rng.normal(0, seed_sd, (seeds, 1)) + rng.normal(0, document_sd, documents)
    noise_SM = rng.normal(0, 0.01, (seeds, documents))
    return (effect_SM + noise_SM) * bytes_M, bytes_M


def test_one_document_and_no_spread_of_documents_is_the_t_test():
    values = np.array([0.3, 0.1, 0.25, 0.2])
    found = estimate(values[:, None], np.ones(1))
    expected = ttest_1samp(values, 0)
    assert found.p_differs == pytest.approx(expected.pvalue, rel=1e-3)
    assert found.interval() == pytest.approx(expected.confidence_interval(0.95))


def test_holm_is_the_published_example():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("sds", [(0.004, 0.03), (0.01, 0.003), (0.003, 0.006)], ids=str)
def test_intervals_hold_the_truth(seeds, sds):
    """Whether seeds or documents or both are what differs."""
    rng, inside = np.random.default_rng(seeds), 0
    for _ in range(1000):
        given = simulated(rng, 0.02, seeds, seed_sd=sds[0], document_sd=sds[1])
        low, high = estimate(*given).interval()
        inside += low <= 0.02 <= high
    assert inside >= 930, inside  # 95 %, less three standard errors of the count


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_of_arms_that_are_the_baseline_one_in_twenty_sweeps_finds_a_difference(seeds):
    rng, wrong = np.random.default_rng(seeds), 0
    for _ in range(1000):
        family = [estimate(*simulated(rng, 0.0, seeds)) for _ in range(5)]
        wrong += any(v.word in ("better", "worse") for v in verdicts(family, 0.0))
    assert wrong <= 70, wrong


@pytest.mark.parametrize("true", [DELTA, -DELTA, 2 * DELTA])
def test_a_difference_that_matters_is_seldom_called_equivalent(true):
    rng, wrong = np.random.default_rng(7), 0
    for _ in range(1000):
        found = estimate(*simulated(rng, true, 3, document_sd=0.003, seed_sd=0.001))
        (verdict,) = verdicts([found], DELTA)
        wrong += verdict.word == "equivalent"
    assert wrong <= 70, wrong


def with_outliers(rng, true, seeds):
    """One seed in ten is ten standard deviations off; nine documents of very unequal size."""
    bytes_M = rng.lognormal(7, 1.8, 9).round() + 1
    off_S = np.where(rng.random(seeds) < 0.1, 10, 1) * rng.normal(0, 0.004, seeds)
    effect_SM = true + off_S[:, None] + rng.normal(0, 0.003, 9)
    return (effect_SM + rng.normal(0, 0.003, (seeds, 9))) * bytes_M, bytes_M


@pytest.mark.thorough
@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_outlier_seeds_and_few_documents_of_unequal_size_cause_no_more_errors(seeds):
    """In 1000 sweeps: intervals, ties of four arms called a difference, called equivalent."""
    rng, inside, differs, equivalent = np.random.default_rng(seeds), 0, 0, 0
    for _ in range(1000):
        low, high = estimate(*with_outliers(rng, 0.02, seeds)).interval()
        inside += low <= 0.02 <= high
        ties = verdicts([estimate(*with_outliers(rng, 0.0, seeds)) for _ in range(4)], 0.0)
        differs += any(v.word in ("better", "worse") for v in ties)
        edge = estimate(*with_outliers(rng, DELTA, seeds))
        equivalent += verdicts([edge], DELTA)[0].word == "equivalent"
    assert inside >= 930 and differs <= 70 and equivalent <= 70, (inside, differs, equivalent)


def test_large_effects_small_effects_and_outliers():
    rng, words = np.random.default_rng(0), {}
    for name, true in {"large": -0.05, "equal": 0.0, "middling": -0.012}.items():
        found = [estimate(*simulated(rng, true, 3, document_sd=0.006)) for _ in range(300)]
        words[name] = [verdicts([d], DELTA)[0].word for d in found]
    assert words["large"].count("better") > 240 and "worse" not in words["large"]
    assert words["equal"].count("better") + words["equal"].count("worse") <= 25
    assert words["middling"].count("undecided") > 50
    # One seed far off makes the others undecided, not the arm worse.
    bits_SM, bytes_M = simulated(rng, -0.02, 3, document_sd=0.003)
    assert verdicts([estimate(bits_SM, bytes_M)], DELTA)[0].word == "better"
    bits_SM[0] += 0.5 * bytes_M
    assert verdicts([estimate(bits_SM, bytes_M)], DELTA)[0].word == "undecided"


def test_what_would_decide():
    near = Estimate(mean=-0.02, seed_variance=0.02**2, document_variance=0.0, seeds=3, documents=9)
    [more] = further_seeds([near], DELTA)
    assert more is not None and 3 < more < 10
    decided = verdicts([near.with_seeds(3 + more)], DELTA)[0]
    assert decided.word == "better"
    assert verdicts([near.with_seeds(2 + more)], DELTA)[0].word == "undecided"
    texts = Estimate(mean=-0.02, seed_variance=0.0, document_variance=0.1, seeds=3, documents=9)
    assert further_seeds([texts], DELTA) == [None], "only more text would decide"
    loose = Estimate(mean=0.002, seed_variance=1.0, document_variance=0.0, seeds=3, documents=9)
    assert further_seeds([loose], DELTA) == [MOST_SEEDS + 1], "seeds would, if very many"
    same = Estimate(0.0, 0.0, 0.0, 3, 9)
    assert verdicts([same], DELTA)[0].word == "equivalent" and same.interval() == (0.0, 0.0)


def test_what_would_decide_is_what_verdicts_say_of_the_whole_family():
    """Arms that are plain leave Holm's full factor to none but the first."""
    clear = [Estimate(-0.3, 1e-5, 1e-8, 3, 40.0)] * 9
    others = [Estimate(-0.02 - 0.005 * i, 0.02**2, 1e-8 * i, 3, 40.0) for i in range(6)]
    texts = Estimate(-0.02, 1e-5, 0.01, 3, 40.0)
    family = [*clear, *others, texts]
    found = further_seeds(family, DELTA)
    assert found[:9] == [0] * 9 and found[-1] is None
    for arm, more in enumerate(found[9:-1], 9):
        assert more is not None and 0 < more < 100
        for seeds, open_ in ((more - 1, True), (more, False)):
            then = verdicts([d.with_seeds(d.seeds + seeds) for d in family], DELTA)
            assert (then[arm].word == "undecided") == open_, (arm, seeds)
    assert further_seeds([], DELTA) == []


def test_one_seed_is_refused():
    with pytest.raises(ValueError, match="1 seed tells nothing"):
        estimate(np.ones((1, 4)), np.ones(4))
