"""The base weights of an adapter: where they are, and whether they are those that it was trained on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eomt.fingerprints import Identity
from eomt.inference.saved import BASE_FILE


def refuse_base(path: Path, ckpt_path: str | None) -> None:
    """Raises ValueError when base weights are given for a network that is complete."""
    if ckpt_path:
        raise ValueError(f"ckpt_path {ckpt_path} is for adapters, and {path} holds a whole network: leave it out")


def moved(init: Mapping[str, Any], ckpt_path: str | None) -> dict[str, Any]:
    """The settings, with the base where it is now: saved again, the adapter names that."""
    return {**init, "ckpt_path": ckpt_path} if ckpt_path and init["ckpt_path"] else dict(init)


def find_base(path: Path, init: Mapping[str, Any]) -> str | None:
    """The checkpoint that an adapter names as its base; None for timm's pretrained weights.

    Raises:
        FileNotFoundError: it is not there. ValueError: it was random, and stands in the adapter folder alone.
    """
    base = init["ckpt_path"]
    if not base and not init["pretrained"]:
        raise ValueError(
            f"the base of {path} was random, and only the run's adapter folder holds it: give "
            f"ckpt_path=.../adapter/{BASE_FILE}"
        )
    if base and not Path(base).expanduser().exists():
        raise FileNotFoundError(
            f"{path} was trained from {base}, which is not there: give the place of these weights with ckpt_path"
        )
    return base


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
            "added to others; give the original base with ckpt_path"
        )
