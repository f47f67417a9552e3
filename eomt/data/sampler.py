"""The order of training images."""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Dataset, DistributedSampler, SequentialSampler


class SeededSampler(DistributedSampler):
    """Shuffled `(index, seed)` pairs: the order, and a seed for each image's augmentation.

    Both follow from the run's seed and the epoch alone. So two runs with one seed train on the same crops in the same
    order, even if one of them draws random numbers for dropout or fresh adapters and the other does not; and a resumed
    run sees what it would have seen.

    `start` is the number of pairs of the epoch that an earlier part of the run has seen.

    Args:
        dataset: what to draw from; its items must take such a pair (`SegmentationDataset` does).
        seed: of the run.
        num_replicas, rank: the processes that share an epoch, and which of them this one is.
    """

    def __init__(self, dataset: Dataset, seed: int, num_replicas: int = 1, rank: int = 0) -> None:
        super().__init__(dataset, num_replicas, rank, shuffle=True, seed=seed % 2**64, drop_last=True)
        self.start = 0

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order, seeds = self.draw(self.epoch)
        order = order[self.rank : self.total_size : self.num_replicas][self.start :]
        return zip(order.tolist(), seeds[order].tolist(), strict=True)

    def draw(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The order of all images in an epoch, and the seed of each."""
        # Not seed + epoch, as in torch: epoch 1 of seed 0 would be epoch 0 of seed 1.
        generator = np.random.default_rng((self.seed, epoch))
        order = generator.permutation(len(self.dataset))
        return order, generator.integers(2**32, size=len(self.dataset))  # torch's generator heeds 32 bits


class SameOrderSampler(SeededSampler, SequentialSampler):
    """The order of the first epoch in all of them, for `overfit_batches`: the same images, augmented anew.

    Lightning puts a sampler of its own, without seeds, in the place of any that is no `SequentialSampler`.
    """

    def draw(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        return super().draw(0)[0], super().draw(epoch)[1]
