"""Files of plain backbones: which are meant, and what is in them; shapes in `.safetensors` are read without torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from eomt.command_line import one_sentence
from eomt.files import read_json, read_pickle, read_tensors
from eomt.settings.formats import refuse_exported
from eomt.settings.hub import local_path
from eomt.suggestions import not_found

SUFFIXES = (".safetensors", ".bin", ".pth", ".pt")
USUAL = ("model.safetensors", "pytorch_model.bin")
PLACES = tuple(f"{name}{ending}" for name in USUAL for ending in ("", ".index.json"))  # whole, or in parts


def weight_files(path: str | Path) -> list[Path]:
    """Returns the files that hold the weights: the one named, or those of a folder.

    Raises:
        FileNotFoundError: there is none. ValueError: it is an adapter, a saved EoMT, or not clear which is meant.
    """
    path = local_path(path)
    if not path.exists():
        raise FileNotFoundError(f"backbone_weights {not_found(path)}")
    refuse_exported(path)
    if not path.is_dir():
        return parts_of(path)
    if (path / "adapter_config.json").is_file():
        raise ValueError(f"backbone_weights {path} is an adapter, which holds no backbone: give what it was trained on")
    if places := places_in(path):
        return parts_of(places[0])
    found = _files_in(path)
    if not found:
        raise FileNotFoundError(f"backbone_weights {path} has no file that ends in {', '.join(SUFFIXES)}")
    raise ValueError(f"backbone_weights {path} has {', '.join(file.name for file in found)}: give one of them")


def places_in(folder: Path) -> list[Path]:
    """Those files of a folder that usually hold weights, or the index of their parts, the preferred one first.

    Without any it is the one file that may hold weights, whatever its name, if there is no other.
    """
    usual = [folder / name for name in PLACES if (folder / name).is_file()]
    found = [] if usual else _files_in(folder)
    return usual or (found if len(found) == 1 else [])


def _files_in(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix in SUFFIXES and file.is_file())


def parts_of(file: Path) -> list[Path]:
    """The files that one of `places_in` stands for."""
    return shards(file) if file.suffix == ".json" else [file]


def shards(index: Path) -> list[Path]:
    """Returns the files that an index of a folder in parts names.

    Raises:
        FileNotFoundError: one is not there. ValueError: it is no such index.
    """
    places = read_json(index).get("weight_map")
    if places is None:
        raise ValueError(f"{index} holds no weights and no index of them: give its folder, {index.parent}")
    if not isinstance(places, Mapping) or not places or not all(isinstance(name, str) for name in places.values()):
        raise ValueError(f"{index} has a weight_map that is none from tensors to files: fetch it again")
    files = [index.parent / Path(name).name for name in sorted(set(places.values()))]
    if missing := [file.name for file in files if not file.is_file()]:
        raise FileNotFoundError(f"{index.parent} lacks {', '.join(missing)}: fetch the folder again")
    return files


def read_state(file: Path) -> dict[str, Any]:
    """Returns the tensors of a file by name; those in nested mappings are named `outer.inner`.

    Raises:
        ValueError: it cannot be read, or holds pickled objects, which are never loaded.
    """
    from torch import Tensor

    content = read_tensors(file)[0] if file.suffix == ".safetensors" else read_pickle(file)
    return {key: value for key, value in flat(content) if isinstance(value, Tensor)}


def flat(content: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values in nested mappings; that of `{"a": {"b": value}}` is named `a.b`."""
    if not isinstance(content, Mapping):
        yield prefix.removesuffix("."), content
    else:
        for key, value in content.items():
            yield from flat(value, f"{prefix}{key}.")


def read_shapes(files: Sequence[Path]) -> dict[str, list[int]]:
    """Returns the shapes of all tensors in the files, by name; raises as `read_state` does."""
    shapes: dict[str, list[int]] = {}
    for file in files:
        if file.suffix == ".safetensors":
            found = header_shapes(file)
        else:
            found = {key: list(tensor.shape) for key, tensor in read_state(file).items()}
        if twice := sorted(shapes.keys() & found.keys()):
            raise ValueError(f"{twice[0]} is in {file.name} and in another file beside it")
        shapes |= found
    return shapes


def header_shapes(file: Path) -> dict[str, list[int]]:
    """Returns the shapes in a `.safetensors` file without reading a tensor; ValueError if it is none."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "np") as opened:
            return {key: opened.get_slice(key).get_shape() for key in opened.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError, TypeError, OverflowError) as error:
        raise ValueError(
            f"{file} cannot be read as tensors ({one_sentence(error)}): it may be half-downloaded, fetch it again"
        ) from error
