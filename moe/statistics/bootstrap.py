"""Bootstrap over rows: how often each is drawn, and the interval of what came of the draws."""

import numpy as np
from scipy.stats import norm
from scipy.stats import t as student


def row_counts(rows: int, samples: int, seed: int) -> np.ndarray:
    """How often each row is drawn in each sample, (samples, rows): rows draws with replacement."""
    rng = np.random.default_rng(seed)
    drawn = rng.integers(rows, size=(samples, rows))
    counts = np.zeros((samples, rows))
    np.add.at(counts, (np.arange(samples)[:, None], drawn), 1)
    return counts


def interval(
    values_S: np.ndarray, estimate: float, level: float = 0.95, spread: float = 1.0
) -> tuple[float, float]:
    """The quantiles of the samples, their distances from the estimate multiplied by `spread`.

    values_S: what the samples gave; those that are not finite are left out.
    spread: `small_sample(rows, parameters)`; resampling alone is too narrow for few rows.
    """
    finite = values_S[np.isfinite(values_S)]
    if not len(finite):
        return np.nan, np.nan
    tails = [(1 - level) / 2, (1 + level) / 2]
    low, high = np.quantile(finite, tails, method="weibull")  # unbiased for few samples
    return float(estimate + spread * (low - estimate)), float(estimate + spread * (high - estimate))


def small_sample(rows: int, parameters: int, level: float = 0.95) -> float:
    """How much wider an interval is for n rows and p parameters than for many rows.

    sqrt(n / (n - p)), as residuals are smaller than errors, times Student's quantile over the
    normal one.
    """
    free, tail = max(rows - parameters, 1), (1 + level) / 2
    return float(np.sqrt(rows / free) * student.ppf(tail, free) / norm.ppf(tail))
