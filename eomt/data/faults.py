"""What is wrong with a pair of an image and its mask, by kind: all of it, not the first alone."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from eomt.data.dataset import SegmentationDataset
from eomt.data.listing import listed
from eomt.data.masks import Lossy, Turned, UnknownValues

SIZES, UNREADABLE = "of another size than their mask", "unreadable"
TURNED, LOSSY, UNKNOWN = "stored turned (EXIF)", "lossy masks", "masks with values of no class"
Faults = Mapping[str, Mapping[str, str]]  # the sentence on each name, by kind


@dataclass
class Examined:
    """A pair that was read: its labels [H, W] if nothing is wrong, or else a sentence by kind of fault.

    `error` is the first of them, `unknown` are the values of the mask that no class lists.
    """

    labels: Tensor | None = None
    faults: dict[str, str] = field(default_factory=dict)
    error: str | None = None
    unknown: list[int | tuple[int, ...]] = field(default_factory=list)


def examine_pair(dataset: SegmentationDataset, index: int) -> Examined:
    """Reads an image and its mask apart from each other, so that the faults of both are found."""
    found = Examined()
    image = _attempt(dataset.image, index, found)
    labels = _attempt(dataset.labels, index, found)
    if image is not None and labels is not None and image.shape[1:] != labels.shape:
        found.error = found.faults[SIZES] = dataset.sizes_differ(index, image, labels)
    found.labels = None if found.faults else labels
    return found


def _attempt(read: Callable[[int], Tensor], index: int, found: Examined) -> Tensor | None:
    try:
        return read(index)
    except (ValueError, OSError) as error:
        kinds = {Turned: TURNED, Lossy: LOSSY, UnknownValues: UNKNOWN}
        kind = kinds.get(type(error), UNREADABLE)
        found.faults[kind] = f"{found.faults[kind]}; {error}" if kind in found.faults else str(error)
        found.error = found.error or str(error)
        found.unknown = getattr(error, "values", found.unknown)
        return None


def by_kind(faults: Mapping[str, Mapping[str, str]]) -> dict[str, dict[str, str]]:
    """The sentence on each name by kind, from those on each kind by name."""
    found: dict[str, dict[str, str]] = {}
    for name, sentences in faults.items():
        for kind, sentence in sentences.items():
            found.setdefault(kind, {})[name] = sentence
    return found


def fault_lines(faults: Faults, unknown: Mapping[str, int]) -> list[str]:
    """A line for each kind: how many there are, the first names, the values that no class lists, and one sentence."""
    lines = []
    for kind, names in faults.items():
        values = f"; the values {listed(list(unknown))}" if kind == UNKNOWN else ""
        remedy = "; --fix-exif writes them upright" if kind == TURNED else ""
        lines.append(f"{len(names):,} {kind}: {listed(list(names))}{values}{remedy}")
        lines.append(f"  {next(iter(names.values()))}")
    return lines
