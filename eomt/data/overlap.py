"""Validation images that are training images: one file under two names, or two files of one content."""

import hashlib
import os
from collections.abc import Iterable, Sequence
from multiprocessing.pool import ThreadPool

from eomt.data.sources import Sample, Source, open_archive, spread

THREADS = 8
COMPARED = 2000  # files at most whose contents are looked into; those of all others are told apart by their sizes
BLOCK = 2**14  # bytes at the start, in the middle and at the end of a file


def shared_images(train: Sequence[Sample], val: Sequence[Sample]) -> set[str]:
    """Names of the validation samples whose image is a training image; no picture is decoded.

    Files are the same where the system says so (also through links), or where size, start, middle and end are equal.
    Of many files of equal sizes, a sample spread evenly is looked into.

    Raises:
        ValueError, OSError: a file is gone.
    """
    with ThreadPool(THREADS) as pool:
        trained, validated = (pool.map(identify, (s.image for s in part), chunksize=256) for part in (train, val))
        files = {file for _, file in trained}
        same = {sample.name for sample, (_, file) in zip(val, validated, strict=True) if file in files}
        sizes = {size for size, _ in trained} & {size for size, _ in validated}
        doubtful = _of_sizes(val, validated, sizes, COMPARED // 4, without=same)
        sizes = {size for size, _ in doubtful}
        likely = _of_sizes(train, trained, sizes, COMPARED - len(doubtful))
        contents = set(pool.map(_content, likely))
        found = zip(doubtful, pool.map(_content, doubtful), strict=True)
        return same | {sample.name for (_, sample), content in found if content in contents}


def identify(image: Source) -> tuple[int, object]:
    """Bytes of an image, and what tells its file from all others; raises ValueError or OSError where it is gone."""
    if image.member is None:
        facts = os.stat(image.path)
        return facts.st_size, (facts.st_dev, facts.st_ino)
    try:
        entry = open_archive(image.path).getinfo(image.member)
    except KeyError:
        image.read()  # which says what to do
        raise
    return entry.file_size, (entry.file_size, entry.CRC)


def _of_sizes(
    samples: Sequence[Sample],
    known: Iterable[tuple[int, object]],
    sizes: set[int],
    count: int,
    without: Iterable[str] = (),
) -> list[tuple[int, Sample]]:
    """Up to `count` plain files of these sizes, evenly spread; archives know checksums, which have been compared."""
    found = [
        (size, sample)
        for sample, (size, _) in zip(samples, known, strict=True)
        if size in sizes and sample.image.member is None and sample.name not in without
    ]
    return [found[index] for index in spread(len(found), count)] if found else []


def _content(file: tuple[int, Sample]) -> tuple[int, bytes]:
    size, sample = file
    digest = hashlib.sha256()
    with open(sample.image.path, "rb") as content:
        for start in (0, max(0, (size - BLOCK) // 2), max(0, size - BLOCK)):
            content.seek(start)
            digest.update(content.read(BLOCK))
    return size, digest.digest()
