"""Several sources of images as one, each as often as its weight says."""

import hashlib
from bisect import bisect_right
from collections.abc import Sequence

import numpy as np

from util.data.sources.source import Source


class Mixture:
    """Several sources as one; each image of a source comes as often as the source's weight.

    It has labels if all of the sources have the same classes.
    """

    def __init__(self, sources: Sequence[Source], weights: Sequence[int]) -> None:
        self.sources, self.weights = sources, weights
        self.root = " + ".join(source.root for source in sources)
        same = all(source.classes == sources[0].classes for source in sources)
        self.classes = sources[0].classes if same else []
        pairs = zip(sources, weights, strict=True)
        labels = np.concatenate([np.tile(source.labels, weight) for source, weight in pairs])
        self.labels = labels if same else np.zeros_like(labels)
        counts = [len(source.labels) * weight for source, weight in zip(sources, weights, strict=True)]
        self.starts = [0, *np.cumsum(counts).tolist()[:-1]]  # of each source, among all images

    def _find(self, index: int) -> tuple[Source, int]:
        number = bisect_right(self.starts, index) - 1
        source = self.sources[number]
        return source, (index - self.starts[number]) % len(source.labels)

    def read(self, index: int) -> bytes:
        source, own = self._find(index)
        return source.read(own)

    def name(self, index: int) -> str:
        source, own = self._find(index)
        return source.name(own)

    def state(self) -> str:
        return self._hash([source.state() for source in self.sources])

    def identity(self) -> str:
        return self._hash([source.identity() for source in self.sources])

    def _hash(self, parts: Sequence[str]) -> str:
        return hashlib.sha256(repr([*zip(parts, self.weights, strict=True)]).encode()).hexdigest()
