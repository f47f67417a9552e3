"""The sizes of a network, from YAML; read and checked without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from eomt.files import read_yaml
from eomt.suggestions import did_you_mean

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class VQAConfig:
    """What a `DeterministicVQA` is built of.

    Args:
        vision: fields of transformers' `Dinov2Config`.
        text: fields of `MBartConfig`, of text encoder and answer decoder.
        img_size: pixels of a side of the square that pictures are resized to.
        fusion_layers, fusion_heads: of the blocks in which the image attends to the question.
        vision_hub, text_hub: names on the hub, or folders, of the pretrained parts.
        tokenizer: a name on the hub or a folder; None: a BPE is trained.
    """

    vision: Mapping[str, Any] = field(default_factory=dict)
    text: Mapping[str, Any] = field(default_factory=dict)
    img_size: int = 224
    fusion_layers: int = 2
    fusion_heads: int = 8
    vision_hub: str | None = None
    text_hub: str | None = None
    tokenizer: str | None = None

    def __post_init__(self) -> None:
        for name in ("img_size", "fusion_layers", "fusion_heads"):
            if type(value := getattr(self, name)) is not int or value < 1:
                raise ValueError(f"{name} {value!r}: it must be a whole number of at least 1")
        for name in ("vision", "text"):
            if not isinstance(value := getattr(self, name), Mapping):
                raise ValueError(
                    f"{name} {value!r}: it must be names and values, fields of transformers' configuration"
                )
        width = self.text.get("d_model")
        if isinstance(width, int) and width % self.fusion_heads:
            raise ValueError(f"fusion_heads {self.fusion_heads}: it must divide text.d_model {width}")

    def as_dict(self) -> dict[str, Any]:
        """Its fields, for JSON."""
        return asdict(self)


def read_config(name: str | Path) -> VQAConfig:
    """The configuration of a YAML file, or one of those beside this module by its name, such as `tiny`.

    Raises:
        ValueError: a name in it is unknown, or a value is none. FileNotFoundError: there is no such file.
    """
    path = FOLDER / f"{name}.yaml" if (FOLDER / f"{name}.yaml").is_file() else Path(name)
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in FOLDER.glob("*.yaml")))
        raise FileNotFoundError(f"--config {name}: there is no such file; give a YAML file, or one of {known}")
    return from_dict(read_yaml(path), path)


def from_dict(content: Mapping[str, Any], source: Path) -> VQAConfig:
    """The configuration that a mapping says; errors name its source."""
    known = [one.name for one in fields(VQAConfig)]
    for name in content:
        if name not in known:
            raise ValueError(f"{source}: {name} is not in the configuration{did_you_mean(name, known)}")
    try:
        return VQAConfig(**content)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
