"""An adapter's base under other names: another version of a library calls the same layers otherwise."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

from eomt.fingerprints import Identity


def record_layers(base: Identity, layers: Iterable[str]) -> dict[str, Any]:
    """What tells the layers of an adapter by their base weights, whatever they are called; tied tensors count once."""
    weights = {layer: base.hashes.get(f"{layer}.weight") for layer in layers}
    return {"tensors": _digest(set(base.hashes.values())), "names": _digest(base.hashes), "weights": weights}


def names_here(record: Mapping[str, Any], base: Identity) -> dict[str, str] | None:
    """The names here of an adapter's layers, by their names in its file, if only the names of the base are others.

    None: the base holds other tensors, has the same names, or holds the weight of an adapted layer twice.
    """
    here = record_layers(base, ())
    weights = record.get("weights")
    if record.get("tensors") != here["tensors"] or record.get("names") == here["names"] or not weights:
        return None
    found = {layer: [n for n, digest in base.hashes.items() if digest == own] for layer, own in weights.items()}
    if any(len(names) != 1 or not names[0].endswith(".weight") for names in found.values()):
        return None
    return {layer: names[0].removesuffix(".weight") for layer, names in found.items()}


def _digest(words: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(sorted(words)).encode()).hexdigest()
