"""Which photos a batch has: the same for the same seed, whatever the number of workers, processes, and restarts."""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

Key = tuple[int, ...]
"""An epoch, and the index of a photo in its split, -1 for one that only fills up a batch; where photos can come several
times in an epoch, also how often this one came before."""


class EpochSampler(Sampler[Key]):
    """Keys in an order drawn from (seed, epoch); Lightning tells it the epoch.

    The global batch of n processes is `batch_size` x n keys, of which process r takes rows r, r + n, ...: together they
    see, batch by batch, what one process with an n times larger batch would. The last incomplete batch is left out.

    Args:
        length: How many photos there are.
        seed: Of the order.
        batch_size: Photos a batch of one process.
        rank: Which process this is.
        world_size: How many there are.
        weights: (length,), how often a photo comes relative to the others; each once where left out.
    """

    def __init__(
        self,
        length: int,
        *,
        seed: int,
        batch_size: int = 1,
        rank: int = 0,
        world_size: int = 1,
        weights: np.ndarray | None = None,
    ) -> None:
        self.length = length
        self.seed = seed
        self.batch_size = batch_size
        self.rank, self.world_size = rank, world_size
        self.weights = weights
        self.epoch = 0
        self._start = (0, 0)

    def set_epoch(self, epoch: int) -> None:
        """Makes the next pass that of `epoch`."""
        self.epoch = epoch

    def start_at(self, epoch: int, batch: int) -> None:
        """Makes passes of `epoch` begin at `batch`, and the next pass that of `epoch`.

        Not the first pass alone: Lightning makes an iterator before training that it may not use, and workers read
        ahead in it.
        """
        self._start = (epoch, batch)
        self.epoch = epoch

    def __len__(self) -> int:
        # That of a whole epoch, wherever it begins: the schedule counts on it.
        return self.length // (self.batch_size * self.world_size) * self.batch_size

    def order(self, epoch: int) -> np.ndarray:
        """Returns the photos' indices in the order of `epoch`, for all processes."""
        generator = np.random.default_rng((self.seed, epoch))
        if self.weights is None:
            return generator.permutation(self.length)
        return generator.permutation(draw_evenly(self.weights, self.length, generator))

    def __iter__(self) -> Iterator[Key]:
        first = self._start[1] * self.batch_size if self._start[0] == self.epoch else 0
        order = self.order(self.epoch)
        rows = np.arange(self.rank, self.length, self.world_size)[first : len(self)]
        if self.weights is None:
            return iter([(self.epoch, index) for index in order[rows].tolist()])
        # Each time with another augmentation.
        before = count_before(order)
        return iter([(self.epoch, *pair) for pair in zip(order[rows].tolist(), before[rows].tolist(), strict=True)])


class EachOnce(Sampler[Key]):
    """Keys of every photo in order, each once; process r of n takes r, r + n, ...

    Where that does not come out even, shares are filled up with keys of index -1: processes wait for each other at
    every batch, so all must have as many.
    """

    def __init__(self, length: int, *, rank: int = 0, world_size: int = 1) -> None:
        self.length = length
        self.rank, self.world_size = rank, world_size

    def __len__(self) -> int:
        return -(-self.length // self.world_size)

    def __iter__(self) -> Iterator[Key]:
        own = list(range(self.rank, self.length, self.world_size))
        return iter([(0, index) for index in [*own, *[-1] * (len(self) - len(own))]])


def count_before(values: np.ndarray) -> np.ndarray:
    """Returns for each of some values how often it stands before that place."""
    order = np.argsort(values, kind="stable")
    places = np.arange(len(values))
    first = np.r_[True, np.diff(values[order]) != 0]
    counts = np.empty(len(values), np.int64)
    counts[order] = places - np.maximum.accumulate(np.where(first, places, 0))
    return counts


def draw_evenly(weights: np.ndarray, count: int, generator: np.random.Generator) -> np.ndarray:
    """Returns `count` indices, each as often as its weight says, rounded up or down by chance (Madow 1949).

    Index i is expected count * weights[i] / sum(weights) times. Independent draws would leave out a third of the photos
    of a class that is to come once each, and draw others two or three times; these do not. Photos of one weight are
    rounded together, so that classes come out even, too.
    """
    order = np.lexsort((generator.random(len(weights)), weights))
    ends = np.cumsum(weights[order])
    points = (generator.random() + np.arange(count)) * (ends[-1] / count)
    return order[np.minimum(np.searchsorted(ends, points, side="right"), len(weights) - 1)]


def balancing_weights(labels: np.ndarray, strength: float = 1.0) -> np.ndarray:
    """Returns how often each photo has to come, relative to the others, for all classes to come equally often.

    With several labels this cannot be had exactly: a photo comes as often as its rarest class asks for (Gupta et al.
    2019, LVIS), and one without any label as often as those of the commonest class.

    Args:
        labels: int64 (n,), or bool (n, classes).
        strength: 0 leaves photos as often as they are, 1 balances the classes; in between, their frequencies are raised
            to the power of 1 - strength (Mahajan et al. 2018 take one half).

    Returns:
        float64 (n,).
    """
    several = labels.ndim == 2
    counts = labels.sum(0) if several else np.bincount(labels)
    by_class = np.maximum(counts, 1).astype(np.float64) ** -strength
    if not several:
        return by_class[labels]
    return np.where(labels, by_class, by_class.min()).max(1)
