"""What training will cost, before a card is rented: parameters, operations and memory, full, with LoRA, and frozen.

A training step is run on tensors without values: no weights, no data and no GPU are needed. Overrides are those of
train_with_lora.py. A * marks what they ask for.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from _data import ROOT

if TYPE_CHECKING:  # late: --help answers at once
    from omegaconf import DictConfig

EXAMPLES = """examples:
  python scripts/cost.py model=vit_large lora=large
  python scripts/cost.py model=vit_large data.img_size=[640,640] data.batch_size=4 --memory 16
  python scripts/cost.py model=vit_base variant=lora_last_k trainer.precision=32-true --json cost.json
  python scripts/cost.py experiment=camvid_dusk model.num_classes=11

--memory leaves 1 GiB of the card to CUDA itself. Exit code 0, or 1 with one sentence."""
CLASSES = 19  # without model.num_classes


def main() -> int:
    """Exit code 0, or 1 with one sentence."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("overrides", nargs="*", metavar="group=choice key=value", help="as for train_with_lora.py")
    add("--memory", type=float, metavar="GIB", help="what fits a card of this size, and the largest batch")
    add("--targets", type=int, metavar="N", help="classes in an image; default: all of them, at most 19")
    add("--json", type=Path, metavar="FILE", help="also write everything to this file, in bytes and operations")
    args = parser.parse_intermixed_args()

    try:
        for option in ("memory", "targets"):
            if (value := getattr(args, option)) is not None and not value > 0:
                raise ValueError(f"--{option} {value:g}: must be greater than 0")
        config = compose(args.overrides)
        facts = costs_of(config, args.memory, args.targets)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    show(facts)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(facts, indent=2) + "\n")
    return 0


def compose(overrides: Sequence[str]) -> "DictConfig":
    """The configuration that training would have; `data.img_size` is the model's, whichever of them is given.

    Raises:
        ValueError: an override that cannot be applied.
    """
    import hydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from eomt.command_line import one_sentence

    words = [word.replace("data.img_size=", "model.img_size=", 1) for word in overrides]
    try:
        with hydra.initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
            return hydra.compose("cityscapes", words)
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(one_sentence(error)) from error


def costs_of(config: "DictConfig", memory: float | None, targets: int | None) -> dict[str, Any]:
    """The configuration in short, and the cost of each variant."""
    from omegaconf import OmegaConf
    from rich.console import Console
    from rich.progress import track

    from eomt.cost.training_cost import BESIDES, build_without_weights, largest_batch, rehearsal, variants
    from eomt.lora.methods import import_method
    from eomt.settings.config_check import check_config, check_type
    from eomt.training.trunk_cache import cached_blocks

    plain = {part: OmegaConf.to_container(config[part], resolve=True) for part in ("model", "trainer")}
    plain["model"]["num_classes"] = plain["model"]["num_classes"] or CLASSES
    check_config(plain)
    settings = {key: value for key, value in plain["model"].items() if key != "_target_"}
    batch_size, trainer = config.data.batch_size, plain["trainer"]
    check_type(batch_size, int, "data.batch_size")
    if batch_size < 1:
        raise ValueError(f"data.batch_size {batch_size}: must be at least 1")
    options = {
        "precision": trainer["precision"],
        "accumulate": trainer["accumulate_grad_batches"],
        "targets": targets,
    }
    ways, given = variants(settings)
    room = None if memory is None else int(memory * 2**30) - BESIDES
    rows = {}
    console = Console(stderr=True)
    import_method(config.model.lora_method)
    for name in track(ways, "costs", console=console, transient=True, disable=not console.is_terminal):
        cached = cached_blocks(build_without_weights(ways[name])) if config.trunk_cache and name == given else 0
        with rehearsal(ways[name], **options, cached_blocks=cached) as cost_of:
            cost = cost_of(batch_size)
            rows[name] = {**asdict(cost), "flops": cost.flops, "given": name == given}
            if room is not None:
                rows[name] |= {"fits": cost.peak <= room, "largest_batch": largest_batch(room, cost_of)}
    asked = ("backbone_name", "img_size", "patch_size", "num_q", "num_blocks", "num_classes")
    facts = {key: settings[key] for key in asked} | {"batch_size": batch_size, "memory": memory} | options
    return {"configuration": facts, "variants": rows}


def show(facts: dict[str, Any]) -> None:
    """A table for the terminal: a column for each variant."""
    from rich.console import Console
    from rich.table import Table

    asked, variants = facts["configuration"], facts["variants"]
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="cyan")
    table.add_column("on each device")
    for name, cost in variants.items():
        table.add_column(name + " *" * cost["given"], justify="right")

    def row(title: str, cell: Callable[[dict[str, Any]], str]) -> None:
        table.add_row(title, *map(cell, variants.values()))

    row("parameters", lambda cost: f"{sum(cost['parameters'].values()) / 1e6:,.2f} M")
    row("  trained", lambda cost: f"{sum(cost['trained'].values()) / 1e6:,.2f} M")
    for part in next(iter(variants.values()))["trained"]:
        row(f"    {part}", lambda cost, part=part: f"{cost['trained'][part] / 1e6:,.2f} M")
    row("TFLOP a step", lambda cost: f"{cost['flops'] / 1e12:,.3g}")
    for way in ("forward", "backward"):
        row(f"  {way}", lambda cost, way=way: f"{cost[f'{way}_flops'] / 1e12:,.3g}")
    row("peak memory", lambda cost: f"{cost['peak'] / 2**30:,.2f} GiB")
    for part in ("weights", "gradients", "optimizer", "activations"):
        row(f"  {part}", lambda cost, part=part: f"{cost[part] / 2**30:,.2f} GiB")
    if asked["memory"] is not None:
        row(f"fits {asked['memory']:g} GiB", lambda cost: "yes" if cost["fits"] else "no")
        row("largest batch", lambda cost: str(cost["largest_batch"] or "none"))

    console = Console(highlight=False)
    title = (
        "{backbone_name}, {img_size[0]}x{img_size[1]}, batch {batch_size}, {precision}, {num_q} queries in the last "
        "{num_blocks} blocks, {num_classes} classes"
    )
    console.print(title.format(**asked), table, sep="\n\n")


if __name__ == "__main__":
    sys.exit(main())
