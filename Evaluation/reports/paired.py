"""Compare the answers of two classifiers to the same images."""

import math
from typing import NamedTuple

import numpy as np

Z = 1.959964  # of a normal variable, for 95 %


class Pair(NamedTuple):
    """Two classifiers on the same images.

    Attributes:
        only_first: images that only the first answers right.
        only_second: images that only the second answers right.
        difference: of the accuracies, second less first, in percentage points.
        interval: of the difference, 95 %; see `difference_interval`.
        p: see `mcnemar`.
        agreement: share of the images that get the same answer, in percent, of those that both answer.
        kappa: Cohen's kappa of these answers; None if both give one single answer to all.
        answered: number of images that both answer.
    """

    only_first: int
    only_second: int
    difference: float
    interval: tuple[float, float]
    p: float
    agreement: float
    kappa: float | None
    answered: int


def pair(right: tuple[np.ndarray, np.ndarray], answers: tuple[np.ndarray, np.ndarray]) -> Pair:
    """Return the comparison of two classifiers.

    Args:
        right: of each, which images are answered right, (images,) bool.
        answers: of each, a number for the class that it names, (images,) int, the same for both; -1 for no answer.
    """
    first, second = (int((own & ~other).sum()) for own, other in (right, right[::-1]))
    images = len(right[0])
    both = (answers[0] >= 0) & (answers[1] >= 0)
    a, b = (own[both] for own in answers)
    same = float((a == b).mean()) if len(a) else math.nan
    return Pair(
        first, second, 100 * (second - first) / images, difference_interval(first, second, images),
        mcnemar(first, second), 100 * same, kappa(a, b), len(a),
    )  # fmt: skip


def difference_interval(only_first: int, only_second: int, images: int) -> tuple[float, float]:
    """Return the 95 % interval of the difference of two accuracies on the same images, in percentage points.

    It is the adjusted Wald interval of Bonett and Price 2012 (Journal of Educational and Behavioral Statistics 37),
    which adds one image to each of the two counts.
    """
    a, b = (only_first + 1) / (images + 2), (only_second + 1) / (images + 2)
    half = Z * math.sqrt((a + b - (b - a) ** 2) / (images + 2))
    return 100 * max(-1.0, b - a - half), 100 * min(1.0, b - a + half)


def mcnemar(only_first: int, only_second: int) -> float:
    """Return the two-sided p of McNemar's exact test.

    It is the chance that images which one of two equally good classifiers answers right are divided as unevenly as
    these, or more: a binomial distribution with one half.
    """
    n, least = only_first + only_second, min(only_first, only_second)
    log_all = math.lgamma(n + 1) - n * math.log(2)
    tail = math.fsum(math.exp(log_all - math.lgamma(k + 1) - math.lgamma(n - k + 1)) for k in range(least + 1))
    return min(1.0, 2 * tail)


def kappa(a: np.ndarray, b: np.ndarray) -> float | None:
    """Return Cohen's kappa of two lists of classes (n,) int from 0: agreement beyond that of chance, up to 1."""
    if not len(a):
        return None
    classes = 1 + max(a.max(), b.max())
    shares = [np.bincount(own, minlength=classes) / len(a) for own in (a, b)]
    chance = float(shares[0] @ shares[1])
    return None if chance == 1 else (float((a == b).mean()) - chance) / (1 - chance)
