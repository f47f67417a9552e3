"""What annotation tools export, picture by picture: COCO, Label Studio, CVAT. Outlines are drawn by pycocotools."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from eomt.data.outlines import Draw, brush, coco_masks, counts_in, mask_in_box, polygons, rectangle, run_lengths
from eomt.files import parse_json

IGNORED = None  # in the place of a label: an area that is neither trained on nor counted


@dataclass
class Shape:
    """An area of a picture.

    Args:
        label: of its class, or `IGNORED`.
        draw: gives its mask, bool [H, W], of a height and width.
    """

    label: str | None
    draw: Draw


@dataclass
class Annotated:
    """A picture of an export.

    Attributes:
        size: (height, width) of the picture that was annotated; None where the export does not say it.
        shapes: in the order of the export.
        boxes: boxes and other shapes that outline nothing; their areas are ignored.
        crowds: areas of several things, which are ignored, too.
        dropped: shapes without an area, such as points.
    """

    size: tuple[int, int] | None
    shapes: list[Shape] = field(default_factory=list)
    boxes: int = 0
    crowds: int = 0
    dropped: int = 0


@dataclass(frozen=True)
class Export:
    """Labels in their order, and the pictures, by what each is called there and what reads it."""

    kind: str
    labels: list[str]
    pictures: list[tuple[str, Callable[[], Annotated]]]


def read_export(path: Path) -> Export:
    """Reads a file of COCO (JSON), Label Studio (JSON or JSON-MIN) or CVAT for images (XML).

    Raises:
        FileNotFoundError: there is no such file. ImportError: pycocotools is not installed.
        ValueError: it is none of these; as are errors in a picture, when that is asked for.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; give the JSON of COCO or Label Studio, or the XML of CVAT")
    coco_masks()
    content = path.read_bytes()
    if content[:4] == b"PK\x03\x04":
        raise ValueError(f"{path} is a zip: unpack it, and give the JSON or XML in it")
    try:
        if content.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<"):
            return _cvat(content)
        found = parse_json(content.decode("utf-8-sig"))
        if isinstance(found, list):
            return _label_studio(found)
        return _coco(found)
    except (ElementTree.ParseError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read ({error}): export it again") from error
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{path} lacks what such an export has ({error!r}): export it again") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


# COCO


def _coco(content: Mapping[str, Any]) -> Export:
    if not isinstance(content, dict) or not {"images", "annotations", "categories"} <= set(content):
        raise ValueError("it has no images, annotations and categories: export it as COCO, Label Studio's JSON or CVAT")
    if any("segments_info" in annotation for annotation in content["annotations"][:1]):
        raise ValueError("it is COCO panoptic, whose masks are pictures: take the export with instances")
    label_of = {category["id"]: str(category["name"]) for category in content["categories"]}
    by_image: dict[Any, list[Mapping[str, Any]]] = {}
    for annotation in content["annotations"]:
        if annotation["category_id"] not in label_of:
            raise ValueError(
                f"annotation {annotation.get('id')} is of category {annotation['category_id']}, which is not listed"
            )
        by_image.setdefault(annotation["image_id"], []).append(annotation)
    known = {image["id"] for image in content["images"]}
    if strays := [key for key in by_image if key not in known]:
        raise ValueError(f"annotations are of image {strays[0]}, which is not listed")
    labels = dict.fromkeys(label_of[key] for key in sorted(label_of))

    def read(image: Mapping[str, Any]) -> Annotated:
        size = (int(image["height"]), int(image["width"])) if image.get("height") and image.get("width") else None
        found = Annotated(size)
        for annotation in by_image.get(image["id"], ()):
            _add_coco(found, annotation, label_of[annotation["category_id"]])
        return found

    return Export(
        "COCO", list(labels), [(str(image["file_name"]), partial(read, image)) for image in content["images"]]
    )


def _add_coco(found: Annotated, annotation: Mapping[str, Any], label: str) -> None:
    """Adds one annotation; a crowd and a box without an outline are areas to ignore."""
    outline = annotation.get("segmentation")
    crowd = bool(annotation.get("iscrowd"))
    if not outline:
        if not annotation.get("bbox"):
            found.dropped += 1
            return
        found.boxes += 1
        found.shapes.append(Shape(IGNORED, rectangle(*map(float, annotation["bbox"]))))
        return
    if isinstance(outline, Mapping):
        counts = outline["counts"]
        counts = counts_in(counts) if isinstance(counts, str) else [int(count) for count in counts]
        draw = run_lengths(counts, outline["size"])
    else:
        outlines = [outline] if isinstance(outline[0], (int, float)) else outline
        _add_polygons(found, IGNORED if crowd else label, outlines)
        found.crowds += crowd
        return
    found.crowds += crowd
    found.shapes.append(Shape(IGNORED if crowd else label, draw))


def _add_polygons(found: Annotated, label: str | None, outlines: Sequence[Sequence[float]]) -> None:
    """Adds polygons that are one shape; those of one point or two have no area."""
    wide = [outline for outline in outlines if len(outline) > 4]
    found.dropped += len(outlines) - len(wide)
    if wide:
        found.shapes.append(Shape(label, polygons(wide)))


# Label Studio


def _label_studio(tasks: list[Any]) -> Export:
    if not tasks or not all(isinstance(task, Mapping) for task in tasks):
        raise ValueError("it is an empty list, or none of Label Studio's tasks: export it as JSON")
    labels = sorted({label for task in tasks for region in _regions(task) for label in _labels(region)[1]})

    def read(task: Mapping[str, Any]) -> Annotated:
        found = Annotated(None)
        for region in _regions(task):
            _add_region(found, region)
        return found

    return Export("Label Studio", labels, [(_image_of(task), partial(read, task)) for task in tasks])


def _image_of(task: Mapping[str, Any]) -> str:
    """The path or address of a task's picture, without its query."""
    data = task.get("data", task)
    places = [value for value in data.values() if isinstance(value, str) and re.search(r"\.\w{3,4}($|\?)", value)]
    place = data.get("image") or (places[0] if places else None) or task.get("file_upload")
    if not isinstance(place, str):
        raise ValueError(f"task {task.get('id')} names no picture: its data has {', '.join(map(str, data))}")
    return place.split("?d=")[-1].split("?")[0]


def _regions(task: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The results of a task's first annotation that was not skipped; in JSON-MIN, the lists in it."""
    if "annotations" not in task and "completions" not in task:
        return [r for value in task.values() if isinstance(value, list) for r in value if isinstance(r, Mapping)]
    kept = [each for each in task.get("annotations") or task.get("completions") or () if not each.get("was_cancelled")]
    return list(kept[0].get("result", ())) if kept else []


def _labels(region: Mapping[str, Any]) -> tuple[str | None, list[str]]:
    """The kind of a region, `polygonlabels`, and its labels."""
    value = region.get("value", region)
    kind = next((key for key in value if key.endswith("labels") and isinstance(value[key], list)), None)
    return kind, [str(label) for label in value[kind]] if kind else []


def _add_region(found: Annotated, region: Mapping[str, Any]) -> None:
    """Adds one region, whose places are percent of the picture."""
    kind, labels = _labels(region)
    value = region.get("value", region)
    if not labels:
        found.dropped += any(key in value for key in ("points", "rle", "x"))
        return
    height, width = (int(region.get(f"original_{side}") or value[f"original_{side}"]) for side in ("height", "width"))
    found.size = (height, width)
    if kind == "polygonlabels":
        outline = [v for x, y in value["points"] for v in (x * width / 100, y * height / 100)]
        _add_polygons(found, labels[0], [outline])
    elif kind == "brushlabels":
        mask = brush(value["rle"], height, width)
        found.shapes.append(Shape(labels[0], lambda *_: mask))
    elif kind in ("rectanglelabels", "ellipselabels"):
        x, y = value["x"] * width / 100, value["y"] * height / 100
        wide, high = (
            value.get(key, value.get(other, 0)) for key, other in (("width", "radiusX"), ("height", "radiusY"))
        )
        wide, high = wide * width / 100, high * height / 100
        if kind == "ellipselabels":
            x, y, wide, high = x - wide, y - high, 2 * wide, 2 * high
        found.boxes += 1
        found.shapes.append(Shape(IGNORED, rectangle(x, y, wide, high, float(value.get("rotation") or 0))))
    else:
        found.dropped += 1


# CVAT


def _cvat(content: bytes) -> Export:
    if b"<!DOCTYPE" in content or b"<!ENTITY" in content:
        raise ValueError("it defines entities of its own, which an export of CVAT never does")
    root = ElementTree.fromstring(content)
    if root.tag != "annotations":
        raise ValueError(f"its first tag is {root.tag}, not annotations: export it as 'CVAT for images 1.1'")
    if root.find("track") is not None:
        raise ValueError("it has tracks of a video: export it as 'CVAT for images 1.1', with its frames")
    images = root.findall("image")
    listed = [name.text for name in root.iterfind(".//labels/label/name") if name.text]
    used = sorted({shape.get("label") for image in images for shape in image if shape.get("label")} - {*listed})

    def read(image: ElementTree.Element) -> Annotated:
        found = Annotated((int(image.attrib["height"]), int(image.attrib["width"])))
        for shape in sorted(image, key=lambda shape: int(shape.get("z_order", 0))):
            _add_cvat(found, shape)
        return found

    names = [*dict.fromkeys(listed), *used]
    return Export("CVAT", names, [(image.attrib["name"], partial(read, image)) for image in images])


def _add_cvat(found: Annotated, shape: ElementTree.Element) -> None:
    label, numbers = shape.get("label"), {key: _number(value) for key, value in shape.attrib.items()}
    if shape.tag == "polygon":
        outline = [float(value) for value in re.split("[,;]", shape.attrib["points"])]
        _add_polygons(found, label, [outline])
    elif shape.tag == "mask":
        counts = [int(value) for value in shape.attrib["rle"].split(",")]
        box = [int(numbers[side]) for side in ("left", "top", "width", "height")]
        found.shapes.append(Shape(label, mask_in_box(counts, *box)))
    elif shape.tag in ("box", "ellipse"):
        if shape.tag == "box":
            x, y, x1, y1 = (numbers[key] for key in ("xtl", "ytl", "xbr", "ybr"))
        else:
            (x, rx), (y, ry) = ((numbers[f"c{axis}"], numbers[f"r{axis}"]) for axis in "xy")
            x, y, x1, y1 = x - rx, y - ry, x + rx, y + ry
        found.boxes += 1
        found.shapes.append(Shape(IGNORED, rectangle(x, y, x1 - x, y1 - y)))
    elif shape.tag != "tag":
        found.dropped += 1


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
