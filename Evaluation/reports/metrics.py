"""Numbers of a classifier's evaluation, from the answer to every image."""

import numpy as np

from Evaluation.tables import wilson
from util.training.evaluation import Answers

BINS = 15  # of the calibration error, as in Guo et al. 2017
BIN_IMAGES = 20  # at least, on average, in the bins of equal numbers: the accuracy of fewer is mostly chance


def measure(answers: np.ndarray, labels: np.ndarray, classes: int) -> dict:
    """Return the numbers that `util.training.evaluation.evaluate` does not give.

    Images without an answer (broken, or logits that are not finite) are wrong answers for all accuracies, and are left
    out of loss, calibration and confusions, as there.

    Args:
        answers: (n, 5), see `Answers.gathered`; at least one image has an answer.
        labels: (n,) int64, classes of the images, also of those without an answer.
        classes: number of outputs.

    Returns:
        `balanced_accuracy` and `macro_f1` in percent, means over the classes with images; `nll`, `brier`; what
        `calibration` returns; `classes`, a list for each column of a table of the classes, where a class without images
        has no accuracy (None); and `confusions`, rows (class, predicted class, images) of the wrong answers, the most
        frequent first.
    """
    predicted = answers[:, 0].astype(np.int64)
    answered = predicted >= 0
    right = predicted == labels
    count = lambda values: np.bincount(values, minlength=classes)  # noqa: E731
    images, correct, predictions = count(labels), count(labels[right]), count(predicted[answered])
    shown = images > 0
    accuracy, f1 = correct[shown] / images[shown], 2 * correct[shown] / (images + predictions)[shown]
    intervals = [wilson(c, n) if n else (None, None) for c, n in zip(correct.tolist(), images.tolist(), strict=True)]
    wrong = answered & ~right
    pairs, times = np.unique(labels[wrong] * classes + predicted[wrong], return_counts=True)
    order = np.argsort(-times, kind="stable")
    confusions = np.stack([*np.divmod(pairs, classes), times], axis=1)[order]
    of = dict(zip(Answers.COLUMNS, answers[answered].T, strict=True))
    return {
        "balanced_accuracy": 100 * float(accuracy.mean()),
        "macro_f1": 100 * float(f1.mean()),
        "nll": float(of["nll"].mean()),
        "brier": float(of["brier"].mean()),
        **calibration(of["confidence"], right[answered]),
        "classes": {
            "images": images.tolist(),
            "unanswered": count(labels[~answered]).tolist(),
            "correct": correct.tolist(),
            "accuracy": [100 * c / n if n else None for c, n in zip(correct.tolist(), images.tolist(), strict=True)],
            "low": [low for low, _ in intervals],
            "high": [high for _, high in intervals],
            "predictions": predictions.tolist(),
        },
        "confusions": confusions.tolist(),
    }


def calibration(confidence: np.ndarray, right: np.ndarray) -> dict:
    """Compare the probabilities of predicted classes with how often they are right.

    Args:
        confidence: (n,) float64, probability of the predicted class.
        right: (n,) bool.

    Returns:
        `confidence`, the mean; `ece` and `ece_equal_mass`, expected calibration errors over `BINS` bins of equal width
        (Guo et al. 2017) and over bins of equal numbers of images (Nixon et al. 2019), all in percent; and `bins` of
        equal width, without empty ones: `low` < confidence <= `high`, `images`, mean `confidence`, `accuracy` and its
        `interval`. There are at most `BINS` bins of equal numbers, and one for each `BIN_IMAGES` images of fewer;
        images of the same confidence are in one bin.
    """
    edges = np.linspace(0, 1, BINS + 1)
    place = np.digitize(confidence, edges[1:-1], right=True)
    bins = []
    for own in groups(place):
        images, correct, number = len(own), int(right[own].sum()), int(place[own[0]])
        bins.append({
            "low": 100 * float(edges[number]),
            "high": 100 * float(edges[number + 1]),
            "images": images,
            "confidence": 100 * float(confidence[own].mean()),
            "accuracy": 100 * correct / images,
            "interval": wilson(correct, images),
        })  # fmt: skip

    def error(place: np.ndarray) -> float:
        gaps = [abs(confidence[own].sum() - right[own].sum()) for own in groups(place)]
        return 100 * float(sum(gaps)) / len(right)

    _, which, counts = np.unique(confidence, return_inverse=True, return_counts=True)
    middles = np.cumsum(counts) - counts / 2  # of the images of each confidence, in the order of confidence
    number = min(BINS, max(1, len(right) // BIN_IMAGES))
    return {
        "confidence": 100 * float(confidence.mean()),
        "ece": error(place),
        "ece_equal_mass": error((middles * number / len(right)).astype(np.int64)[which]),
        "bins": bins,
    }


def groups(place: np.ndarray) -> list[np.ndarray]:
    """Return the images of each bin that has any, from the bin of each image (n,) int64."""
    return [np.flatnonzero(place == number) for number in np.unique(place)]
