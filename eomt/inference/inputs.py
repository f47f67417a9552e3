"""Finds the images or the video that a prediction reads, and refuses what cannot be, before torch is imported."""

import glob
import re
from pathlib import Path

from eomt.data.listing import Listing, list_pictures, match_pictures
from eomt.files import PICTURES, check_place
from eomt.inference.video import VIDEOS, Video
from eomt.suggestions import not_found

OVERLAY_VIDEO = "overlay.mp4"


def find_inputs(source: str, output: Path, submission: bool) -> Video | dict[str, Path]:
    """Returns the opened video that `source` is, or its images by the name that their pictures get.

    Args:
        source: an image, a folder of images, a pattern of images, or a video.
        output: the folder that will be written to.
        submission: whether names are those of the Cityscapes benchmark.

    Raises:
        ValueError, OSError: the input cannot be used, or `output` is a file.
    """
    check_place(output)
    path = Path(source).expanduser()
    if path.suffix.lower() not in VIDEOS or not path.is_file():
        return _find_images(path, output, submission)
    if submission:
        raise ValueError(f"{path} is a video: a Cityscapes submission is made of the benchmark's images")
    if path.resolve() == (output / OVERLAY_VIDEO).resolve():
        raise ValueError(f"{path} would be overwritten: give another OUTPUT")
    return Video(path)


def _find_images(source: Path, output: Path, submission: bool) -> dict[str, Path]:
    """Returns the images by the name of their pictures, without extension; never those below `output`.

    Raises:
        FileNotFoundError: there are none. ValueError: two have one name, or one does not suit the benchmark.
    """
    found = _list_files(source)
    folder = output.resolve()
    paths = sorted(path for path in set(found.paths) if folder not in path.resolve().parents)
    if not paths:
        raise FileNotFoundError(
            f"{source}: no image ({', '.join(PICTURES)}) outside of OUTPUT {output}, and no video ({', '.join(VIDEOS)})"
        )
    images: dict[str, Path] = {}
    for path in paths:
        name = _submission_name(path) if submission else str(path.relative_to(found.root).with_suffix(""))
        if name in images:
            raise ValueError(f"{images[name]} and {path} would both be written to {name}.png: take one away")
        images[name] = path
    if submission:
        others = set(output.rglob("*.png")) - {output / f"{name}.png" for name in images}
        if others:
            raise ValueError(f"{min(others)} is in the way: the benchmark takes one PNG an image; give a fresh OUTPUT")
    return images


def _list_files(source: Path) -> Listing:
    """Returns the pictures of a folder or a pattern, or the one, below the folder that their names start from."""
    if source.is_dir():
        return list_pictures(source)
    if source.is_file():
        return Listing(source.parent, [(source.name,)] if source.suffix.lower() in PICTURES else [])
    if glob.has_magic(str(source)):
        return match_pictures(source)
    raise FileNotFoundError(not_found(source))


def _submission_name(path: Path) -> str:
    """Returns CITY_SEQ_FRAME_labelIds, which cityscapesScripts' evalPixelLevelSemanticLabeling looks for."""
    match = re.match(r"[^_]+_\d{6}_\d{6}(?=[_.])", path.name)
    if not match:
        raise ValueError(f"{path}: a benchmark image is named like berlin_000000_000019_leftImg8bit.png; take it away")
    return f"{match[0]}_labelIds"
