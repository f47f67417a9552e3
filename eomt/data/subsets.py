"""Parts of a data set's training images: fewer of them, and some that are held out to choose settings by."""

import random
from collections.abc import Sequence

from eomt.data.sources import Sample


def choose_images(samples: Sequence[Sample], count: int, seed: int) -> list[Sample]:
    """Chooses `count` samples at random, in their order; with the same seed fewer are a part of more.

    Raises:
        ValueError: there are not as many.
    """
    if not 1 <= count <= len(samples):
        raise ValueError(f"data.train_images must lie between 1 and {len(samples)}, the images there are, got {count}.")
    order = list(range(len(samples)))
    random.Random(seed).shuffle(order)
    return [samples[index] for index in sorted(order[:count])]


def hold_out(samples: Sequence[Sample], share: float, seed: int) -> tuple[list[Sample], list[Sample]]:
    """Splits training samples into those to train on and about a `share` of them to score settings on.

    Neighbouring frames of a video are near-copies, so a sequence stands on one side: whole ones are held out, in an
    order drawn with `seed`, as long as that comes nearer to the share. Of a single sequence, the last frames are.
    Where the data set names no sequences, images are drawn at random.

    Raises:
        ValueError: the share is not between 0 and 1, or there is only one sample.
    """
    if not 0 < share < 1:
        raise ValueError(f"data.hold_out must lie between 0 and 1, got {share}; null holds nothing out.")
    if len(samples) < 2:
        raise ValueError(f"data.hold_out needs at least 2 training images, there is {len(samples)}; leave it out.")
    wanted = min(len(samples) - 1, max(1, round(share * len(samples))))
    if any(sample.sequence is None for sample in samples):
        held = {id(sample) for sample in choose_images(samples, wanted, seed)}
        return [s for s in samples if id(s) not in held], [s for s in samples if id(s) in held]
    return split_sequences(samples, wanted, seed)


def split_sequences(samples: Sequence[Sample], wanted: int, seed: int) -> tuple[list[Sample], list[Sample]]:
    """Splits samples that name their sequences as `hold_out` does, about `wanted` of them into the second part."""
    if len({sample.sequence for sample in samples}) == 1:
        return list(samples[:-wanted]), list(samples[-wanted:])
    chosen = _choose_sequences(samples, wanted, seed)
    return [s for s in samples if s.sequence not in chosen], [s for s in samples if s.sequence in chosen]


def _choose_sequences(samples: Sequence[Sample], wanted: int, seed: int) -> set[str]:
    """Sequences that together have about `wanted` samples: at least one, and never all."""
    sizes: dict[str, int] = {}
    for sample in samples:
        sizes[sample.sequence] = sizes.get(sample.sequence, 0) + 1
    order = sorted(sizes)
    random.Random(seed).shuffle(order)
    chosen: set[str] = set()
    for name in order[:-1]:  # never all
        missing = wanted - sum(sizes[each] for each in chosen)
        if abs(missing - sizes[name]) < abs(missing):
            chosen.add(name)
    return chosen or {min(order, key=sizes.__getitem__)}
