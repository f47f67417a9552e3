"""The JSON files that are written to be read later, and the number of each one's schema; torch is not needed."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from eomt import __version__
from eomt.files import REQUIRED, read_json


class Format(NamedTuple):
    """A kind of JSON file.

    Every number from 1 to `newest` can be read; a file without one is of the time before it was written, which is 1.
    """

    newest: int
    key: str = "schema_version"
    needs: Mapping[str, type | tuple[type, ...]] = MappingProxyType({})  # entries that every schema has


TEXT, NUMBER = str, (int, float)
ARTEFACT = Format(1, key="schema")  # eomt_config.json of a saved network
SUMMARY = Format(1, needs={"status": TEXT})  # summary.json of a run
SCORES = {"miou": NUMBER, "class_iou": dict, "classes": list, "images": list}
EVALUATION = Format(1, needs=SCORES)  # evaluation/NAME.json
ANOMALY = Format(1)  # anomaly/BENCHMARK.json
MATRIX = Format(1, needs={"variants": list})  # matrix.json of a comparison
NEEDS = {"img_size": list, "class_names": list, "class_colors": list, "outputs": TEXT, "images": TEXT}
EXPORTED = Format(1, key="schema", needs=NEEDS)  # the metadata of an ONNX file or a package of torch.export
TUNING = Format(1, needs={"chosen": dict, "trials": list})  # tuning/VARIANT.json of a matrix
CELL = Format(1, needs={"status": TEXT})  # cell.json of one of its runs
REPORT = Format(1, needs={"table": list})  # report.json of a comparison


EXPORTED_FILES = {  # endings of networks that no weights are read from, and who takes them
    ".onnx": "an ONNX file, which scripts/predict.py takes and nothing else here",
    ".pt2": "a package, which torch.export.load opens",
}


def refuse_exported(path: Path) -> None:
    """Raises ValueError where a file is an exported network, and a saved one is meant."""
    if path.suffix in EXPORTED_FILES:
        raise ValueError(
            f"{path} is an exported network ({EXPORTED_FILES[path.suffix]}): give the folder or file that it was "
            "exported from"
        )


def stamped(kind: Format, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what such a file holds: the facts, behind the schema and the version that writes it."""
    return {kind.key: kind.newest, "eomt_lora": __version__, **facts}


def read_format(path: str | Path, kind: Format, default: Any = REQUIRED) -> dict[str, Any]:
    """Returns what a file of this kind holds, or the default if there is no file.

    Raises:
        ValueError: it is no JSON, of a version to come, or without what it needs.
        FileNotFoundError: there is no file, and no default was given.
    """
    content = read_json(path, default)
    check_format(content, kind, path)
    return content


def check_format(content: Mapping[str, Any] | None, kind: Format, path: str | Path) -> None:
    """Raises ValueError where what a file of this kind holds is of a version to come, or without what it needs."""
    number = (content or {}).get(kind.key, 1)
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise ValueError(f"{path} says {kind.key} {number!r}: a number from 1 to {kind.newest} is meant; look at it")
    if number > kind.newest:
        raise ValueError(
            f"{path} has {kind.key} {number}, written by eomt-lora {content.get('eomt_lora', 'of a later version')}; "
            f"this is {__version__}, which reads up to {kind.newest}: install the version that wrote it, or a later one"
        )
    for name, wanted in kind.needs.items() if content else ():
        if not isinstance(content.get(name), wanted):
            raise ValueError(f"{path} has no {name} as it was written: put the file back or write it again")
