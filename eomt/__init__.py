"""EoMT, a plain ViT that segments, fine-tuned with and without LoRA."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

HOMES = {  # imported when they are first asked for: torch takes seconds
    "MaskClassificationSemantic": "eomt.training.mask_classification_semantic",
    "apply_lora": "lora_config",
    "LoRASettings": "lora_config",
}
__all__ = ["LoRASettings", "MaskClassificationSemantic", "apply_lora"]


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module 'eomt' has no attribute {name!r}")
    return getattr(import_module(HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
