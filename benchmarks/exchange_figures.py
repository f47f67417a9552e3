"""Tables about networks for other programs: exchange.json, quantised.json, quantised_base.json, extraction.json."""

from benchmarks.words import Facts, markdown
from eomt.comparison.table import NONE


def exchange(facts: Facts) -> str:
    """A line for whose file, who reads it; for each network the largest difference and the pixels of the same class."""
    names = list(facts["parts"])
    found = {name: {(row["file"], row["reader"]): row for row in part["rows"]} for name, part in facts["parts"].items()}
    pairs = list(dict.fromkeys(pair for rows in found.values() for pair in rows))
    titles = [f"{name}: {what}" for name in names for what in ("largest difference", "same class")]
    lines = []
    for pair in pairs:
        rows = [found[name].get(pair) for name in names]
        cells = [[f"{row['difference']:.0e}", f"{100 * row['same']:.2f} %"] if row else [NONE, NONE] for row in rows]
        lines.append([*pair, *(cell for both in cells for cell in both)])
    return markdown(["file of", "read by", *titles], lines)


def quantised(facts: Facts) -> str:
    """A line for each network and variant: mIoU, bytes and seconds an image."""
    rows = [(name, row) for name, part in facts["parts"].items() for row in part["rows"]]
    return markdown(
        ["network", "variant", "mIoU, %", "MiB", "s an image"],
        [
            [name, row["variant"], f"{100 * row['miou']:.2f}", f"{row['bytes'] / 2**20:.1f}", f"{row['seconds']:.3f}"]
            for name, row in rows
        ],
    )


def quantised_base(facts: Facts) -> str:
    """A line for each task and base: mIoU over its seeds and the largest measured peak."""
    rows = [(name, row) for name, part in facts["parts"].items() for row in part["rows"]]
    return markdown(
        ["task", "base", "seeds", "mIoU, %", "peak memory of the process, MiB"],
        [
            [name, row["base"], str(len(row["runs"])), f"{100 * row['miou']:.2f}", f"{row['peak_memory'] / 2**20:,.0f}"]
            for name, row in rows
        ],
    )


def extraction(facts: Facts) -> str:
    """A line for each network and rank: the share of the squared change that it keeps, and its mIoU."""
    lines = []
    for name, part in facts["parts"].items():
        kept = {"0": 0.0, **part["kept"], "targets": 1.0}
        lines += [[name, rank, f"{100 * share:.1f}", f"{100 * part['miou'][rank]:.2f}"] for rank, share in kept.items()]
        lines.append([name, "full", NONE, f"{100 * part['miou']['full']:.2f}"])
    return markdown(["network", "rank", "kept, %", "mIoU, %"], lines)


def extraction_left_out(facts: Facts) -> str:
    """What no rank holds, of the first network."""
    part = next(iter(facts["parts"].values()))
    largest = sorted(part["left_out"].items(), key=lambda item: -item[1]["relative"])[:4]
    kinds = ", ".join(f"`{name}` (by {100 * kind['relative']:.0f} %)" for name, kind in largest)
    tensors = sum(int(kind["tensors"]) for kind in part["left_out"].values())
    return f"""
        {100 * part["left_out_share"]:.1f} % of the backbone's squared change is in {tensors} other tensors, which no
        rank holds; of their own size changed most {kinds}.
    """
