"""Statistics compared with scipy's, closed forms, and simulated experiments."""

import numpy as np
import pytest
from scipy import stats

from mochi.report.statistics import Components, Difference, components, paired


@pytest.mark.parametrize("num", [2, 3, 10])
def test_paired_differences_equal_scipys(num: int) -> None:
    draw = np.random.default_rng(num)
    ours, baseline = draw.normal(70, 2, (2, num))
    found = paired(dict(enumerate(ours)), dict(enumerate(baseline)))
    assert found is not None
    expected = stats.ttest_rel(ours, baseline)
    low, high = expected.confidence_interval(0.95)
    assert (found.mean, found.low, found.high) == pytest.approx(
        (np.mean(ours - baseline), low, high), rel=1e-12
    )
    assert found.significant == (expected.pvalue < 0.05)
    assert found.num == num


def test_only_common_seeds_are_paired() -> None:
    found = paired({0: 10.0, 1: 12.0, 7: 99.0}, {1: 10.0, 0: 9.0, 5: 1.0})
    assert found is not None
    assert (found.mean, found.num) == (1.5, 2)
    assert paired({0: 1.0}, {1: 1.0}) is None


def test_a_single_seed_has_no_interval() -> None:
    found = paired({0: 10.0}, {0: 9.0})
    assert found == Difference(1.0, None, None, 1)
    assert found.significant is None


def test_equal_differences_have_an_interval_of_width_0() -> None:
    none = paired({0: 1.0, 1: 2.0}, {0: 1.0, 1: 2.0})
    assert none == Difference(0.0, 0.0, 0.0, 2)
    assert none.significant is False, "nothing differs"
    one = paired({0: 2.0, 1: 3.0}, {0: 1.0, 1: 2.0})
    assert one == Difference(1.0, 1.0, 1.0, 2)
    assert one.significant is True


def test_intervals_cover_the_true_difference() -> None:
    """2,000 experiments with 3 seeds; scores vary with the seed and with the row."""
    draw = np.random.default_rng(0)
    true, covered = 0.7, 0
    for _ in range(2000):
        seeds = draw.normal(75, 2, 3)
        baseline = dict(enumerate(seeds + draw.normal(0, 0.5, 3)))
        row = dict(enumerate(seeds + true + draw.normal(0, 0.5, 3)))
        found = paired(row, baseline)
        assert found is not None
        assert found.low is not None
        assert found.high is not None
        covered += found.low <= true <= found.high
    assert 0.93 <= covered / 2000 <= 0.97


def test_variance_components_by_hand() -> None:
    # Two encoders, each with two fine-tunings: within (0.5 + 0.5) / 2, between means 1 and 5: 8 - 0.5 / 2.
    found = components({0: [0.5, 1.5], 1: [4.5, 5.5]})
    assert found.fine_tuning == pytest.approx(0.5**0.5)
    assert found.encoder == pytest.approx((8 - 0.25) ** 0.5)
    assert components({0: [1.0, 3.0]}) == Components(None, pytest.approx(2**0.5))
    assert components({0: [1.0], 1: [3.0]}) == Components(pytest.approx(2**0.5), None)
    assert components({0: [0.0, 9.0], 1: [1.0, 8.0]}).encoder == 0, "no negative variance"
    assert components({0: [1.0]}) == Components(None, None)


def test_variances_of_uneven_groups_in_fractions() -> None:
    """Within: (2 + 20) / (7 - 3). Between means 2, 9, 5 around 45 / 7: 237 / 7, less what is within, over
    n0 = (7 - (4 + 16 + 1) / 7) / 2 = 2. An encoder without a fine-tuning does not count."""
    found = components({0: [1.0, 3.0], 1: [6.0, 8.0, 10.0, 12.0], 2: [5.0], 3: []})
    assert found.fine_tuning == pytest.approx(5.5**0.5, rel=1e-12)
    assert found.encoder == pytest.approx(((237 / 7 - 5.5) / 2) ** 0.5, rel=1e-12)
    assert components({0: [1.0], 1: [4.0], 2: [7.0]}) == Components(pytest.approx(3.0, rel=1e-12), None)


def test_variance_components_of_simulated_experiments() -> None:
    draw = np.random.default_rng(1)
    found = []
    for _ in range(400):
        encoders = draw.normal(50, 1.0, 4)
        found.append(
            components({index: draw.normal(mean, 0.5, 2 + index) for index, mean in enumerate(encoders)})
        )
    assert np.mean(
        [each.fine_tuning**2 for each in found if each.fine_tuning is not None]
    ) == pytest.approx(0.25, rel=0.1)
    assert np.mean([each.encoder**2 for each in found if each.encoder is not None]) == pytest.approx(
        1.0, rel=0.15
    )
