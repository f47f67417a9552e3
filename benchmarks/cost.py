"""What scripts/cost.py counts of a ViT-L at 1024x1024, of one and of two images a step: nothing of it is measured.

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
BATCHES = (1, 2)


def ways() -> tuple[dict[str, dict[str, Any]], str]:
    """The ways to train, as settings of the network by name, and the precision."""
    config = plain(compose_run(OVERRIDES))
    settings = {key: value for key, value in config["model"].items() if key != "_target_"} | {"num_classes": CLASSES}
    found = variants(settings)[0]
    checkpointed = found["LoRA, last 4"] | {"checkpoint_predictions": True}
    return found | {"LoRA, last 4, checkpoint_predictions": checkpointed}, config["trainer"]["precision"]


def main() -> None:
    """Writes the costs as JSON, in bytes and operations."""
    facts = {"what": __doc__.splitlines()[0], "overrides": OVERRIDES} | provenance([0])
    found, facts["precision"] = ways()
    facts["variants"] = {}
    for name, settings in found.items():
        with rehearsal(settings, precision=facts["precision"]) as cost_of:
            costs = [cost_of(batch) for batch in BATCHES]
        facts["variants"][name] = [asdict(cost) | {"flops": cost.flops} for cost in costs]
    write_json(sys.argv[1], facts)


if __name__ == "__main__":
    main()
