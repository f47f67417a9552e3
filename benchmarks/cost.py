"""What scripts/cost.py counts of a ViT-L at 1024x1024, and of larger bases in fewer bits: nothing of it is measured.

python benchmarks/cost.py benchmarks/cost.json
"""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from eomt.cost.training_cost import rehearsal, variants
from eomt.cost.variant_costs import CLASSES
from eomt.files import write_json
from eomt.reporting.run_summary import provenance
from eomt.settings.compose import compose_run, plain

OVERRIDES = ["model=vit_large", "lora=large", "model.img_size=[1024,1024]"]
BATCHES = (1, 2)  # images a step of the ViT-L
BASES = {  # of the larger networks, at one crop of 640x640 a step
    "float32": [],
    "base_dtype=bfloat16": ["model.base_dtype=bfloat16"],
    "base_quantisation=8bit": ["model.base_quantisation=8bit"],
    "base_quantisation=4bit": ["model.base_quantisation=4bit"],
}


def composed(overrides: list[str]) -> tuple[dict[str, Any], str]:
    """The settings of the network, and the precision."""
    config = plain(compose_run(overrides))
    settings = {key: value for key, value in config["model"].items() if key != "_target_"} | {"num_classes": CLASSES}
    return settings, config["trainer"]["precision"]


def costs(settings: dict[str, Any], precision: str, batches: tuple[int, ...]) -> list[dict[str, Any]]:
    """What a step takes with so many images."""
    with rehearsal(settings, precision=precision) as cost_of:
        found = [cost_of(batch) for batch in batches]
    return [asdict(cost) | {"flops": cost.flops} for cost in found]


def bases(model: str) -> dict[str, dict[str, Any]]:
    """What a step with LoRA takes on a frozen base of this model, by how its weights are kept."""
    run = [f"model={model}", "lora=large", "model.img_size=[640,640]", "model.use_lora=true"]
    return {name: costs(*composed([*run, *changes]), batches=(1,))[0] for name, changes in BASES.items()}


def main() -> None:
    """Writes the costs as JSON, in bytes and operations."""
    facts = {"what": __doc__.splitlines()[0], "overrides": OVERRIDES} | provenance([0])
    settings, precision = composed(OVERRIDES)
    ways = variants(settings)[0]
    ways["LoRA, last 4, checkpoint_predictions"] = ways["LoRA, last 4"] | {"checkpoint_predictions": True}
    facts["precision"] = precision
    facts["variants"] = {name: costs(way, precision, BATCHES) for name, way in ways.items()}
    facts["bases"] = {model: bases(model) for model in ("vit_giant", "vit_7b_dinov3")}
    write_json(sys.argv[1], facts)


if __name__ == "__main__":
    main()
