"""Compares what it costs to train a network in full, with LoRA, and frozen."""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from eomt.settings.backbone_choice import choose_backbone
from eomt.settings.config_check import check_config, check_type
from eomt.settings.run import check_model

CLASSES = 19  # without model.num_classes


def variant_costs(config: Mapping[str, Any], memory: float | None, targets: int | None) -> dict[str, Any]:
    """Returns the configuration in short, and the cost of a training step of each variant.

    Args:
        config: of a run, plain and resolved; it may lack `model.num_classes`.
        memory: GiB of a card; None: do not look for the largest batch.
        targets: classes in every image; None: as many as there are, at most 19.

    Returns:
        `configuration`, and `variants`: the fields of `Cost` by name of the variant, with `flops`, `given`, and under
        `memory` also `fits` and `largest_batch`.

    Raises:
        ValueError: settings that cannot be meant.
    """
    model, trainer, batch_size = dict(config["model"]), config["trainer"], config["data"]["batch_size"]
    model["num_classes"] = model["num_classes"] or CLASSES
    check_type(batch_size, int, "data.batch_size")
    if batch_size < 1:
        raise ValueError(f"data.batch_size {batch_size}: must be at least 1")
    check_model(model)  # what torch is not needed for comes first

    from eomt.cost.training_cost import variants
    from eomt.lora.methods import import_method

    check_config({"model": model, "trainer": trainer})
    import_method(model["lora_method"])
    settings = {key: value for key, value in model.items() if key != "_target_"}
    ways, given = variants(settings)
    options = {
        "precision": trainer["precision"],
        "accumulate": trainer["accumulate_grad_batches"],
        "targets": targets,
    }
    rows = _costs(ways, given, batch_size=batch_size, memory=memory, trunk_cache=config["trunk_cache"], options=options)
    asked = ("backbone_name", "img_size", "patch_size", "num_q", "num_blocks", "num_classes")
    settings["backbone_name"] = choose_backbone(settings["backbone_name"], settings.get("backbone_weights"))
    facts = {key: settings[key] for key in asked} | {"batch_size": batch_size, "memory": memory} | options
    return {"configuration": facts, "variants": rows}


def _costs(
    ways: Mapping[str, Mapping[str, Any]],
    given: str,
    batch_size: int,
    memory: float | None,
    trunk_cache: bool,
    options: Mapping[str, Any],
) -> dict[str, dict[str, Any]]:
    """Returns the cost of each way to train, by its name; `given` is the one that was asked for."""
    from rich.console import Console
    from rich.progress import track

    from eomt.cost.training_cost import BESIDES, build_without_weights, largest_batch, rehearsal
    from eomt.training.trunk_cache import cached_blocks

    room = None if memory is None else int(memory * 2**30) - BESIDES
    rows = {}
    console = Console(stderr=True)
    for name in track(ways, "costs", console=console, transient=True, disable=not console.is_terminal):
        cached = cached_blocks(build_without_weights(ways[name])) if trunk_cache and name == given else 0
        with rehearsal(ways[name], **options, cached_blocks=cached) as cost_of:
            cost = cost_of(batch_size)
            rows[name] = {**asdict(cost), "flops": cost.flops, "given": name == given}
            if room is not None:
                rows[name] |= {"fits": cost.peak <= room, "largest_batch": largest_batch(room, cost_of)}
    return rows


def print_costs(facts: dict[str, Any]) -> None:
    """Prints a table of what `variant_costs` returns, with a column for each variant."""
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
