"""The table of trainable parameters."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from eomt.fingerprints import ADAPTER_PREFIXES, is_adapter
from eomt.lora.quantised import count_parameters

OWN = "|".join(ADAPTER_PREFIXES)
WIDTH = 80  # columns


def trainable_report(module: nn.Module, title: str | None = None, parts: Mapping[str, nn.Module] | None = None) -> str:
    """The trainable tensors, one line per group of equal shape and equal name but for numbers, and the totals.

    It fits 80 columns: what all names begin with is left out, and long ones have a line of their own.
    `parts` are modules by the names that subtotals give them: adapters of `vision` count as `vision LoRA`. Without a
    `title`, it says LoRA where there are adapters.
    """
    groups: dict[tuple[str, tuple[int, ...]], list[tuple[str, ...]]] = defaultdict(list)
    start = _common_start([name for name, _ in module.named_parameters()])
    for name, p in module.named_parameters():
        if p.requires_grad:
            name = name.removeprefix(start).replace(".base_layer.", ".")
            name = re.sub(rf"(\.(?:{OWN})\w+)\.\w+(\.weight)?$", r"\1", name)  # lora_A.default.weight
            numbers = tuple(part for part in name.split(".") if part.isdigit())
            groups[re.sub(r"(?<![^.])\d+(?![^.])", "#", name), tuple(p.shape)].append(numbers)
    rows = []
    for (pattern, shape), numbers in groups.items():
        name = pattern.replace("#", "%s") % tuple(_span(column) for column in zip(*numbers, strict=True))
        size = len(numbers) * torch.Size(shape).numel()
        rows.append((name, f"{len(numbers)} x {list(shape)}" if len(numbers) > 1 else str(list(shape)), f"{size:,}"))
    lines = _in_columns(rows)
    trainable = sum(p.numel() for p in module.parameters() if p.requires_grad)
    total = count_parameters(module)
    if title is None:
        has_adapters = any(is_adapter(name) for name, _ in module.named_parameters())
        title = "TRAINABLE PARAMETERS (LoRA)" if has_adapters else "TRAINABLE PARAMETERS"
    if parts:
        lines += [f"  {name}: {size:,}" for name, size in subtotals(module, parts).items()]
    share = 100 * trainable / max(total, 1)
    totals = [f"Total trainable: {trainable:,}", f"Total frozen: {total - trainable:,}"]
    return "\n".join([title, *lines, *totals, f"SUMMARY: {share:.2f}% trainable"])


def _common_start(names: Sequence[str]) -> str:
    """`network.`, where the names of all parameters begin with it."""
    first = {name.partition(".")[0] for name in names}
    return f"{first.pop()}." if len(first) == 1 and all("." in name for name in names) else ""


def _in_columns(rows: Sequence[tuple[str, str, str]]) -> list[str]:
    """Name, shape and size: shapes stand at the right, since those of long names are short."""
    size = max((len(row[2]) for row in rows), default=0)
    room = WIDTH - size - 4  # for a name, two spaces and its shape
    width = max((len(name) + 2 + len(shape) for name, shape, _ in rows), default=0)
    lines = []
    for name, shape, count in rows:
        if len(name) + 2 + len(shape) > room:
            lines.append(f"  {name}")
            name = ""
        lines.append(f"  {name}{shape:>{min(width, room) - len(name)}}  {count:>{size}}")
    return lines


def subtotals(module: nn.Module, parts: Mapping[str, nn.Module]) -> dict[str, int]:
    """Trainable parameters by part, each counted once: in the first part that holds it, or in `other`."""
    place = {id(p): name for name in reversed(parts) for p in parts[name].parameters()}
    sizes = dict.fromkeys((key for name in parts for key in (f"{name} LoRA", name)), 0)
    for name, p in module.named_parameters():
        if p.requires_grad:
            part = place.get(id(p), "other")
            key = f"{part} LoRA" if is_adapter(name) else part
            sizes[key] = sizes.get(key, 0) + p.numel()
    return {name: size for name, size in sizes.items() if size or name in parts}


def _span(numbers: Iterable[str]) -> str:
    """("0", "1", "2") -> "{0..2}", ("0", "2") -> "{0,2}", ("4", "4") -> "4"."""
    values = sorted({int(number) for number in numbers})
    if len(values) == 1:
        return str(values[0])
    if len(values) > 2 and values == list(range(values[0], values[-1] + 1)):
        return f"{{{values[0]}..{values[-1]}}}"
    return "{" + ",".join(map(str, values)) + "}"
