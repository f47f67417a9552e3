"""The base weights of an adapter: where they are, and whether they are those that it was trained on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eomt.fingerprints import Identity
from eomt.inference.saved import BASE_FILE
from eomt.settings.hub import local_path, pinned

PLACES = ("ckpt_path", "backbone_weights")  # settings that name files of weights, which may move
Places = Mapping[str, str | Path | None]


def refuse_base(path: Path, given: Places) -> None:
    """Raises ValueError when base weights are given for a network that is complete."""
    for name, place in given.items():
        if place:
            raise ValueError(f"{name} {place} is for adapters, and {path} holds a whole network: leave it out")


def moved(init: Mapping[str, Any], given: Places) -> dict[str, Any]:
    """The settings, with the base where it is now: saved again, the adapter names that."""
    return {**init, **{name: str(pinned(place)) for name, place in given.items() if place and init[name]}}


def find_base(path: Path, init: Mapping[str, Any], given: Places) -> dict[str, str | None]:
    """The settings `PLACES` of an adapter's base: what is given, or else what the adapter names.

    Both are None for timm's pretrained weights.

    Raises:
        FileNotFoundError: it is not there. ValueError: it was random, and stands in the adapter folder alone.
    """
    if given.get("ckpt_path") and not init["ckpt_path"]:  # a whole EoMT takes the place of a plain backbone
        init = {**init, "backbone_weights": None}
    places = {name: given.get(name) or init[name] for name in PLACES}
    if not any(places.values()) and not init["pretrained"]:
        raise ValueError(
            f"the base of {path} was random, and only the run's adapter folder holds it: give "
            f"ckpt_path=.../adapter/{BASE_FILE}"
        )
    for name, place in places.items():
        if place and not given.get(name) and not local_path(place).exists():
            raise FileNotFoundError(
                f"{path} was trained from {place}, which is not there: give the place of these weights with {name}"
            )
    return {name: place and str(place) for name, place in places.items()}


def record_base(base: Identity | None) -> dict[str, Any]:
    """Returns what an adapter's configuration or checkpoint says of its base; `recorded_base` reads it."""
    return {"base_fingerprint": base and base.exact, "base_weights": base and base.as_dict()}


def recorded_base(saved: Mapping[str, Any]) -> Identity:
    """Reads what `record_base` wrote, now or in an earlier version."""
    return Identity.from_dict(saved.get("base_fingerprint"), saved.get("base_weights"))


def check_base(saved: Mapping[str, Any], here: Identity, what: str) -> None:
    """Raises ValueError when an adapter meets other base weights than its own."""
    try:
        recorded = recorded_base(saved)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error
    if difference := recorded.difference(here):
        raise ValueError(
            f"{what} was trained on base weights that this backbone does not have ({difference}): its updates would be "
            "added to others; give the original base with ckpt_path or backbone_weights"
        )
