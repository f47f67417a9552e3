"""Shows what is in a saved network: tables for the terminal, and a plot of an adapter's updates."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.bar import Bar
from rich.console import Console
from rich.table import Table
from rich.text import Text

from eomt.diagnosis.checks import spans
from eomt.files import replacing


def print_facts(facts: Mapping[str, Any], console: Console) -> None:
    """Prints tables of what `inspect_model` returns."""

    def table(title: str, rows: Iterable[tuple[str, str]]) -> None:
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="cyan", no_wrap=True)
        grid.add_column(overflow="fold")
        for name, value in rows:
            grid.add_row(f"  {name}", Text(str(value)))
        console.print(f"[bold]{title}[/bold]", grid, sep="\n")

    console.print(Text(f"{facts['kind'][0].upper()}{facts['kind'][1:]}  {facts['path']}", style="bold"), soft_wrap=True)
    table("Network", network_rows(facts))
    if "lora" in facts:
        table("LoRA", lora_rows(facts))
        table("Base", base_rows(facts))
    parts = Table("part", box=None, padding=(0, 2))
    for title in ("tensors", "parameters", "MB"):
        parts.add_column(title, justify="right")
    for part, count in facts["parts"].items():
        parts.add_row(part, f"{count['tensors']:,}", f"{count['parameters']:,}", f"{count['bytes'] / 1e6:.2f}")
    totals = [sum(count[name] for count in facts["parts"].values()) for name in ("tensors", "parameters", "bytes")]
    parts.add_row("total", f"{totals[0]:,}", f"{totals[1]:,}", f"{totals[2] / 1e6:.2f}", style="bold")
    console.print("[bold]Tensors stored[/bold]", parts, sep="\n")
    table("Files", [(name, f"{size:,} bytes") for name, size in facts["files"].items()])
    if facts.get("updates"):
        print_updates(facts["updates"], console)


def network_rows(facts: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    """Yields names and values that are known of the network."""
    network = facts["network"]
    if "backbone_name" in network:
        own = ", ".join(f"{name}={value}" for name, value in network.get("backbone_kwargs", {}).items())
        yield "backbone", network["backbone_name"] + (f" ({own})" if own else "")
    else:
        yield "backbone", "not named: weights without a configuration"
    for name, title in (("depth", "depth"), ("embed_dim", "width"), ("patch_size", "patch size")):
        if name in network:
            yield title, network[name]
    if "img_size" in network:
        yield "image size", "{} x {} (height x width)".format(*network["img_size"])
    if "num_blocks" in network:
        yield "queries", f"{network.get('num_q')}, in the last {network['num_blocks']} blocks"
    if "num_classes" in network:
        names = network.get("class_names")
        yield "classes", f"{network['num_classes']}: {', '.join(names)}" if names else network["num_classes"]
    if facts["precision"]:
        yield "trained in", facts["precision"]
    if facts.get("backbone_fingerprint"):
        yield "fingerprint", f"{facts['backbone_fingerprint']} (backbone)"


def lora_rows(facts: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    """Yields names and values of the adapter's settings."""
    lora, updates = facts["lora"], facts["updates"]
    if "method" in lora:
        yield "method", lora["method"]
        yield "targets", ", ".join(lora["target_modules"])
        return

    def each(name: str) -> str:
        values = sorted({update[name] for update in updates.values()})
        return f"{values[0]:g}" if len(values) == 1 else f"{values[0]:g} to {values[-1]:g}"

    blocks = sorted({split(name)[0] for name in updates} - {None})
    yield "rank", each("rank")
    yield "alpha", f"{lora['alpha']:g}, scaling {each('scaling')}"
    yield "dropout", lora["dropout"]
    yield "targets", ", ".join(sorted({split(name)[1] for name in updates}))
    yield "layers", f"{len(updates)}, in {len(blocks)} blocks: {spans(blocks, dash='-')}"
    if lora["options"]:
        yield "options", ", ".join(f"{name}={value}" for name, value in lora["options"].items())
    yield "heads", ", ".join(part for part in facts["parts"] if part not in ("adapters", "buffers and others"))


def base_rows(facts: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    """Yields names and values of the base, and whether the adapter fits it."""
    yield "named", facts["base"]
    yield "fingerprint", facts["base_fingerprint"] or "none"
    fit = facts["fit"]
    if fit is None:
        yield "fits", "not checked, for the base is not there: give --base"
        return
    yield "checked", fit["base"]
    yield {True: "fits", False: "does not fit", None: "unknown"}[fit["fits"]], fit["why"]


def split(name: str) -> tuple[int | None, str]:
    """Returns (3, `attn.qkv`) for `blocks.3.attn.qkv`; the block is None outside of blocks."""
    parts = name.split(".")
    place = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return (None, name) if place is None else (int(parts[place]), ".".join(parts[place + 1 :]))


def by_target(updates: Mapping[str, Mapping]) -> dict[str, dict[int, Mapping]]:
    """Groups updates by target, then by block; outside of blocks at -1."""
    groups: dict[str, dict[int, Mapping]] = defaultdict(dict)
    for name, update in updates.items():
        block, target = split(name)
        groups[target][-1 if block is None else block] = update
    return dict(groups)


def print_updates(updates: Mapping[str, Mapping], console: Console) -> None:
    """Prints a bar for each layer, as long as the norm of its update."""
    largest = max(update["norm"] for update in updates.values())
    console.print(
        "[bold]Updates[/bold]  norm of scaling B A" + ", and its share of the base weight's" * norms_known(updates)
    )
    for target, blocks in by_target(updates).items():
        table = Table.grid(padding=(0, 2))
        for justify in ("right", "right", "right"):
            table.add_column(justify=justify, no_wrap=True)
        table.add_column(width=40)
        for block, update in blocks.items():
            share = "" if update["relative"] is None else f"{100 * update['relative']:.1f} %"
            bar = Bar(largest or 1, 0, update["norm"], color="cyan")
            table.add_row(f"    block {block}" if block >= 0 else "    ", f"{update['norm']:.3g}", share, bar)
        console.print(f"  [cyan]{target}[/cyan]", table, sep="\n")
    if largest == 0:
        console.print("  All are zero: this adapter has not been trained.", style="yellow")


def norms_known(updates: Mapping[str, Mapping]) -> bool:
    """Tells whether the norms of the base weights are known."""
    return all(update["relative"] is not None for update in updates.values())


def plot_updates(facts: Mapping[str, Any], path: Path) -> None:
    """Writes a PNG with the norm of each update, by block and target, and below it in % of the base weights' norms.

    Args:
        facts: as `inspect_model` returns them for an adapter; base norms may be missing.
        path: of the PNG.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups, relative = by_target(facts["updates"]), norms_known(facts["updates"])
    figure, axes = plt.subplots(1 + relative, 1, figsize=(9, 3 + 2.5 * relative), squeeze=False, layout="constrained")
    for axis, (key, scale, label) in zip(
        axes[:, 0], [("norm", 1, "norm of the update"), ("relative", 100, "% of the base weight")], strict=False
    ):
        width = 0.8 / len(groups)
        for i, (target, blocks) in enumerate(groups.items()):
            places = [block + (i - (len(groups) - 1) / 2) * width for block in blocks]
            axis.bar(places, [scale * update[key] for update in blocks.values()], width, label=target)
        numbers = sorted({block for blocks in groups.values() for block in blocks})
        axis.set_xticks(numbers, [str(n) if n >= 0 else "other" for n in numbers])
        axis.set(xlabel="block", ylabel=label)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(groups), frameon=False)
    axes[0, 0].set_title(f"Updates of {facts['path']}")
    with replacing(path) as draft:
        figure.savefig(draft, dpi=120)
    plt.close(figure)
