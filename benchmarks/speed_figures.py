"""Tables and sentences with figures about speed and memory, from speed_cpu.json and startup_many.json."""

import statistics

from benchmarks.words import Facts, markdown, span
from eomt.comparison.table import NONE, percentage


def speed_cells(row: Facts) -> list[str]:
    """What, the two sides, their ratio, the target, whether it is met, and the floor, of a line of run.py."""
    ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
    met = {True: "met", False: "missed", None: ""}[row["met"]]
    target = row["target"].replace("<=", "\N{LESS-THAN OR EQUAL TO}").replace(">=", "\N{GREATER-THAN OR EQUAL TO}")
    return [row["what"], row["peer"], row["ours"], ratio, target, met, row["floor"]]


CLEAR_RATIO = 0.95  # of times; one nearer to 1 may be noise
SPEED_TITLES = ["what", "peer", "ours", "ratio", "target", "met", "floor, peer / ours"]


def speed_table(facts: Facts, *parts: str) -> str:
    rows = [speed_cells(row) for part in parts for row in facts["parts"][part]["rows"]]
    return markdown(SPEED_TITLES, [["**missed**" if cell == "missed" else cell for cell in row] for row in rows])


def speed_training(facts: Facts) -> str:
    return speed_table(facts, "step", "loss")


def speed_around(facts: Facts) -> str:
    return speed_table(facts, "data", "val", "infer", "startup")


def speed_ways(facts: Facts) -> str:
    """A line for each shortcut: the ratio of times, and of counted operations where they differ."""
    rows = facts["parts"]["ways"]["rows"]
    flops = {row["facts"]["case"]: row for row in rows if row["what"].endswith("counted FLOPs")}
    return markdown(
        ["the step with", "against", "ratio of times", "time as it is", "counted FLOPs"],
        [
            [
                row["what"].removeprefix("step with ").removesuffix(": time"),
                row["facts"]["sides"]["peer"],
                f"{row['ratio']:.2f}",
                row["ours"],
                f"{flops[row['facts']['case']]['ratio']:.2f}" if row["facts"]["case"] in flops else NONE,
            ]
            for row in rows
            if row["facts"]["case"] not in flops or row is not flops[row["facts"]["case"]]
        ],
    )


def speed_memory(facts: Facts) -> str:
    rows = [row["facts"] for row in facts["parts"]["memory"]["rows"]]
    return markdown(
        ["what a step adds", "measured", "estimated", "estimated / measured"],
        [
            [
                row["what"],
                f"{row['without_gaps'] / 2**20:,.0f} MiB",
                f"{row['estimated'] / 2**20:,.0f} MiB",
                f"{row['estimated'] / row['without_gaps']:.2f}",
            ]
            for row in rows
        ],
    )


def speed_growth(facts: Facts) -> str:
    """A line for each axis, from its first point to its last: operations, time and memory as multiples."""
    rows = facts["parts"]["scaling"]["rows"]
    lines = []
    for time, memory in zip(rows[::2], rows[1::2], strict=True):
        axis = time["what"].removeprefix("full step, ").split(": ")[0]
        both = [cell for row in (time, memory) for cell in (row["ours"], f"{row['ratio']:.2f}")]
        lines.append([axis, time["peer"].removesuffix(" FLOPs"), *both])
    return markdown(["from, to", "FLOPs", "time", "time / FLOPs", "memory", "memory / FLOPs"], lines)


def speed_run(facts: Facts) -> str:
    """The machine, and which parts were measured on which commit."""
    commits: dict[str, list[str]] = {}
    for name, part in facts["parts"].items():
        commits.setdefault(part["git_commit"], []).append(name)
    machine, versions = (facts["parts"]["step"][name] for name in ("machine", "versions"))
    where = "; ".join(
        f"{', '.join(names)} at {commit[:7]}" + " with changes that were not committed" * commit.endswith("-dirty")
        for commit, names in commits.items()
    )
    return f"""
        The machine: {machine["threads"]} threads of an {machine["processor"].replace("(R)", "")}, float32, torch
        {versions["torch"].split("+")[0]}; a large matrix product runs at {machine["matrix_rate_gflops"]:.0f} GFLOP/s.
        Measured: {where}. No GPU was measured.
    """


def of_case(facts: Facts, part: str, case: str) -> dict[str, Facts]:
    """The lines of a case by what they measure: `time`, `counted FLOPs`, ..."""
    rows = [row for row in facts["parts"][part]["rows"] if row["facts"].get("case") == case]
    return {row["what"].rpartition(": ")[2]: row for row in rows}


def speed_floors(facts: Facts) -> str:
    lora, last, kept = (of_case(facts, "step", f"step.{case}") for case in ("lora", "last", "checkpoint"))
    beside = max(case["time"]["ratio"] / case["counted FLOPs"]["ratio"] - 1 for case in (last, kept))
    full = of_case(facts, "step", "step.full")["time"]["facts"]
    peer, ours = (statistics.median(full["seconds"][side]) for side in ("peer", "ours"))
    floor = full["floor_seconds"]["ours"]
    return f"""
        Where the time goes: a full step takes {ours / floor:.1f} times its floor, which alone is
        {percentage(floor / peer)} of the peer's step. LoRA in all blocks saves
        {percentage(1 - lora["counted FLOPs"]["ratio"])} of the operations and
        {percentage(1 - lora["time"]["ratio"])} of the time: the rest goes into its own small products and sums. LoRA in
        the last blocks, and with `checkpoint_predictions`, stay within {percentage(beside)} of what their operations
        say. The loss reads and writes the five feature maps, whole.
    """


def speed_gains(facts: Facts) -> str:
    """Which of the shortcuts gain time."""
    rows = [row for row in facts["parts"]["ways"]["rows"] if row["what"].endswith(": time")]
    names = {row["what"].removeprefix("step with ").removesuffix(": time"): row["ratio"] for row in rows}
    gained = {name: ratio for name, ratio in names.items() if ratio < CLEAR_RATIO}
    others = span([ratio for name, ratio in names.items() if name not in gained], ".2f")
    listed = "; ".join(f"{name} ({ratio:.2f})" for name, ratio in gained.items())
    return f"Clear gains of time on this CPU: {listed or 'none'}. The ratios of the others are {others}."


def speed_decoding(facts: Facts) -> str:
    found = of_case(facts, "data", "data")["speed"]["facts"]
    peer, ours = (statistics.median(found["seconds"][side]) for side in ("peer", "ours"))
    floor = found["floor_seconds"]["ours"]
    return f"""
        Decoding the PNG is {percentage(floor / ours)} of the time of a training sample: with decoding alone it would be
        {peer / floor:.1f} times as fast as the peer. The pictures are drawn streets,
        blurred to the bytes of Cityscapes' own.
    """


def colours_of_crops(facts: Facts) -> str:
    agreed = of_case(facts, "data", "data")["speed"]["facts"]["agreed"]
    return f"""
        The published code changes the colours of the whole image before it resizes and crops, and keeps one mask per
        class. Here only the crop is recoloured and labels stay one map. With the same draws: {agreed}
        ([speed.md](speed.md)). Nothing is normalised here: the model does that, once.
    """


def speed_left_out(facts: Facts) -> str:
    rows = [row["facts"] for row in facts["parts"]["memory"]["rows"]]
    apart = [(row["without_gaps"] - row["estimated"]) / 2**20 for row in rows]
    return f"What the estimate leaves out hardly depends on the step: libraries' own buffers, {span(apart)} MiB."


def speed_same_task(facts: Facts) -> str:
    """The same task on several axes of growth, each in a process of its own."""
    rows = facts["parts"]["scaling"]["rows"]
    task = rows[0]["facts"]["task"]
    names = {"image side": "side", "batch": "batch", "queries": "queries", "classes in an image": "targets"}
    found = {}
    for row in rows[::2]:
        axis = next(axis for axis in names if row["what"].startswith(f"full step, {axis} "))
        points = dict(zip(row["facts"]["values"], row["facts"]["points"], strict=True))
        if task[names[axis]] in points:
            found[axis] = points[task[names[axis]]]["seconds"]
    seconds = ", ".join(f"{value:.1f} s on the axis of the {axis}" for axis, value in found.items())
    return f"""
        Every point is a process of its own, measured once: the same task (side {task["side"]}, batch {task["batch"]},
        {task["queries"]} queries) took {seconds}. Memory grows more slowly than the operations, but for the classes,
        where both grow little.
    """


def speed_same_results(facts: Facts) -> str:
    row = facts["parts"]["equality"]["rows"][0]
    return f"""
        And 200 steps on toy streets with all of them and with none (transformers' network and loss, whole images
        augmented, a mask a class) end at mIoU {row["ours"]} and {row["peer"]} over {len(row["facts"]["seeds"])} seeds
        (`--only equality`).
    """


def estimate_of_memory(facts: Facts) -> str:
    """How far the estimate is off, for each network of benchmarks/memory.py."""
    rows = [row["facts"] for row in facts["parts"]["memory"]["rows"]]
    words = []
    for network, start in (("a tiny network", "tiny"), ("a ViT-S", "ViT-S")):
        own = [row for row in rows if row["what"].startswith(start)]
        shares = span([100 * row["estimated"] / row["without_gaps"] for row in own])
        words.append(f"{shares} % of {network}'s {span([row['without_gaps'] / 2**20 for row in own], ',.0f')} MiB")
    return f"""
        Every run logs the estimate when it starts and prints the measured peak beside it at the end; `summary.json` has
        both (`estimated_memory`, `peak_memory`). On a CPU, compare what training added: gaps in the C library's heap
        come on top. Without them the estimate was {" and ".join(words)}
        ([speed.md](speed.md#memory-estimated-and-measured)). It has not been compared on a GPU.
    """


def startup_many(facts: Facts) -> str:
    """The later run of each kind, and of many images the first one, too, which hashes them."""
    few, many = ([run for run in facts["runs"] if (run["images"] > 8) == large] for large in (False, True))
    machine, last = facts["machine"], {"few": few[-1], "many": many[-1]}
    return f"""
        A run of one step on folders of small PNGs ({machine["processor"]}, {machine["threads"]} threads, idle;
        `{facts["commands"][0]}`, commit {facts["git_commit"][:7]},
        [benchmarks/startup_many.json](../benchmarks/startup_many.json)): with {last["many"]["images"]:,} images the
        first step is done after {last["many"]["seconds_to_first_step"]:.1f} s, with
        {last["many"]["mib_at_first_step"]:,} MiB resident; with {last["few"]["images"]} after
        {last["few"]["seconds_to_first_step"]:.1f} s, with {last["few"]["mib_at_first_step"]:,} MiB, most of them for
        importing torch, torchvision, timm and Lightning. From start to end it is {last["many"]["seconds"]:.1f} s and
        {last["many"]["peak_mib"]:,} MiB at the peak, and {many[0]["seconds"]:.1f} s and {many[0]["peak_mib"]:,} MiB the
        first time, when {2 * many[0]["images"]:,} files are hashed after the last step; {last["few"]["seconds"]:.1f} s
        and {last["few"]["peak_mib"]:,} MiB with {last["few"]["images"]} images.
    """
