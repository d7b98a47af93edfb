"""Paired differences over seeds, and variance components of detection scores."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
"""Level of every confidence interval."""


@dataclass(frozen=True)
class Difference:
    """A row minus the baseline, paired over seeds."""

    mean: float
    low: float | None
    """Bounds of the confidence interval; None for a single pair."""
    high: float | None
    num: int
    """Number of pairs."""

    @property
    def significant(self) -> bool | None:
        """Whether the interval excludes zero; None without an interval."""
        if self.low is None or self.high is None:
            return None
        return self.low > 0 or self.high < 0


def paired(values: Mapping[Any, float], baseline: Mapping[Any, float]) -> Difference | None:
    """The mean difference over the seeds that both have, and its interval by Student's t.

    A seed fixes the order of the data, the views and the initial weights of both rows, so their difference
    varies less than either score does.

    Args:
        values: seed -> score of a row.
        baseline: seed -> score of the baseline.

    Returns:
        None without a common seed. Equal differences have an interval of width 0.
    """
    common = [pair for pair in values if pair in baseline]
    if not common:
        return None
    differences = np.array([values[pair] - baseline[pair] for pair in common], dtype=np.float64)
    mean, num = float(differences.mean()), len(differences)
    if num == 1:
        return Difference(mean, None, None, 1)
    half = stats.t.ppf((1 + CONFIDENCE) / 2, num - 1) * differences.std(ddof=1) / math.sqrt(num)
    return Difference(mean, mean - float(half), mean + float(half), num)


@dataclass(frozen=True)
class Components:
    """Standard deviations of the scores of several fine-tunings of several encoders."""

    encoder: float | None
    """Between encoders, without the variance of the fine-tunings; None for a single encoder."""
    fine_tuning: float | None
    """Between fine-tunings of one encoder; None if each encoder has one."""


def components(values: Mapping[Any, Sequence[float]]) -> Components:
    """Split the variance of detection scores into a part between encoders and one between fine-tunings.

    One-way random effects by the method of moments (Searle, Casella & McCulloch 1992, section 3.6); a
    negative estimate of the encoder's variance counts as zero.

    Args:
        values: encoder -> score of each of its fine-tunings.
    """
    groups = [np.asarray(scores, dtype=np.float64) for scores in values.values() if len(scores)]
    total, num_groups = sum(map(len, groups)), len(groups)
    within = None
    if total > num_groups:
        within = float(sum(((group - group.mean()) ** 2).sum() for group in groups) / (total - num_groups))
    between = None
    if num_groups > 1:
        grand = np.concatenate(groups).mean()
        mean_square = sum(len(group) * (group.mean() - grand) ** 2 for group in groups) / (num_groups - 1)
        size = (total - sum(len(group) ** 2 for group in groups) / total) / (num_groups - 1)
        between = max(0.0, float((mean_square - (within or 0.0)) / size))
    return Components(*(None if value is None else math.sqrt(value) for value in (between, within)))
