"""Counts of confusions and the numbers from them, against scikit-learn and a loop over classes."""

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix, jaccard_score, recall_score

from Evaluation.iou import Confusions

NAMES = ["a", "b", "c", "d", "e"]


def drawn(seed, shape=(3, 20, 30)):
    """Truth with classes 0 to 2 and ignored pixels, predictions of 0, 1 and 3: 4 occurs in neither."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(-1, 3, shape)
    return np.where(rng.random(shape) < 0.4, truth.clip(0), rng.choice([0, 1, 3], shape)), truth


def test_numbers_equal_those_of_scikit_learn():
    predicted, truth = drawn(0)
    confusions = Confusions(5)
    for own, answer in zip(predicted, truth, strict=True):
        confusions.add(torch.from_numpy(own), torch.from_numpy(answer).short())
    kept = truth >= 0
    y, z = truth[kept], predicted[kept]
    np.testing.assert_array_equal(confusions.counts[:, :-1], confusion_matrix(y, z, labels=range(5)))
    result = confusions.summary(NAMES)
    assert result["miou"] == pytest.approx(100 * jaccard_score(y, z, average="macro", labels=range(4)), abs=1e-9)
    assert result["mean_acc"] == pytest.approx(100 * recall_score(y, z, average="macro", labels=range(3)), abs=1e-9)
    assert result["pixel_acc"] == pytest.approx(100 * (y == z).mean(), abs=1e-9)
    assert result["pixels"] == kept.sum()
    for number, row in enumerate(result["classes"]):
        own, other = y == number, z == number
        assert (row["name"], row["pixels"], row["predicted"]) == (NAMES[number], own.sum(), other.sum())
        union = (own | other).sum()
        assert row["iou"] == (pytest.approx(100 * (own & other).sum() / union, abs=1e-9) if union else None)
        assert row["acc"] == (pytest.approx(100 * other[own].mean(), abs=1e-9) if own.any() else None)
    assert [row["iou"] for row in result["classes"]][3:] == [0, None]


def test_all_pixels_ignored():
    confusions = Confusions(2)
    confusions.add(torch.ones(4, dtype=torch.int64), torch.full((4,), -1))
    result = confusions.summary(["a", "b"])
    assert (result["miou"], result["pixel_acc"], result["mean_acc"], result["pixels"]) == (None, None, None, 0)


def test_counts_beyond_floating_point_are_exact():
    """float64 would not tell 2**53 from 2**53 + 1."""
    confusions = Confusions(2)
    confusions.counts[0, 0] = 2**53
    confusions.add(torch.tensor([0, 1]), torch.tensor([0, 0]))
    result = confusions.summary(["a", "b"])
    assert result["pixels"] == 2**53 + 2
    assert result["classes"][0]["predicted"] == 2**53 + 1
