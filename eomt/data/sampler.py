"""The order of training images."""

from collections.abc import Iterator

import torch
from torch.utils.data import Dataset, DistributedSampler


class SeededSampler(DistributedSampler):
    """Shuffled `(index, seed)` pairs: the order, and a seed for each image's augmentation.

    Both follow from the run's seed and the epoch alone. So two runs with one seed train on the same crops in the same
    order, even if one of them draws random numbers for dropout or fresh adapters and the other does not; and a resumed
    run sees what it would have seen.

    Args:
        dataset: what to draw from; its items must take such a pair (`SegmentationDataset` does).
        seed: of the run.
        num_replicas, rank: the processes that share an epoch, and which of them this one is.
    """

    def __init__(self, dataset: Dataset, seed: int, num_replicas: int = 1, rank: int = 0) -> None:
        super().__init__(dataset, num_replicas, rank, shuffle=True, seed=seed % 2**32, drop_last=True)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        generator = torch.Generator().manual_seed((self.seed << 20) + self.epoch)
        seeds = torch.randint(2**62, (len(self.dataset),), generator=generator).tolist()
        return ((index, seeds[index]) for index in super().__iter__())
