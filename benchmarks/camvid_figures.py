"""Tables and sentences about CamVid and about what guides say of LoRA, from the `report.json` of its matrices."""

from collections.abc import Sequence

from benchmarks.figures import by_variant, difference, points
from benchmarks.words import Facts, markdown
from eomt.comparison.table import NONE, mebibytes, percentage


def split_run(facts: Facts) -> str:
    train, val = (facts["data"][f"{split}_images"] for split in ("train", "val"))
    return f"""
        CamVid's own split, {train} images to train on and {val} to validate, from a pretrained DINOv2 ViT-S/14 with
        random queries and heads. Every variant takes {facts["steps"]} steps of two 256x256 crops in bf16, the same
        crops in the same order, at learning rates chosen for it on held-out training images, and is scored after the
        last step. {len(facts["seeds"])} seeds. Seconds and memory are of 30 steps that had the two cores of an
        {facts["machine"]["processor"]} for themselves:
    """


NAMES = {
    "lora_r16": "LoRA at rank 16",
    "lora_r4": "LoRA at rank 4",
    "lora_last_k": "LoRA in the last three blocks",
    "unfreeze_last_n": "the last three blocks alone",
    "head": "heads alone",
}


def against_full(rows: dict[str, Facts]) -> str:
    """The points of each variant above the full fine-tune and their interval, those that are measurable first."""
    apart, level = [], []
    for name, words in NAMES.items():
        if row := rows.get(name):
            value, interval = difference(row).split(" (")
            measurable = row["reading"].startswith(("above", "below"))
            (apart if measurable else level).append(f"{words} ({value} points, {interval}")
    first = f"Measurably apart from the full fine-tune {'are' if apart[1:] else 'is'} {listed(apart)}." if apart else ""
    to = "it" if apart else "the full fine-tune"
    return f"{first} No difference to {to} is measurable for {listed(level)}.".strip() if level else first


def split_findings(facts: Facts) -> str:
    rows = by_variant(facts)
    full, lora = rows["full"], rows["lora_r16"]
    smaller = [full[key] / lora[key] for key in ("artefact_bytes", "checkpoint_bytes")]
    time, operations, memory = (
        percentage(saved(rows, name)) for name in ("seconds", "flops_per_step", "peak_memory_bytes")
    )
    return f"""
        {against_full(rows)} LoRA's artefact is {smaller[0]:.0f} times smaller, its checkpoints
        {smaller[1]:.0f} times. A step takes {time} less time and {operations} fewer FLOPs; the
        process keeps {memory} less memory. Read with care: three seeds tell little of how seeds vary, which makes the
        intervals wide; {beyond(facts)}; the validation images are one sequence; and {facts["steps"]} steps are few.
    """


def split_rates(facts: Facts) -> str:
    """What the full fine-tune gained by a decay of its own."""
    full = next(tuning for tuning in facts["tuning"] if tuning["variant"] == "full")
    scores: dict[float, float] = {}
    for trial in full["trials"]:
        decay = trial["settings"]["model.llrd"]
        scores[decay] = max(scores.get(decay, 0), trial["miou"])
    told = listed([f"{100 * score:.2f} % with {decay:g}" for decay, score in sorted(scores.items())])
    return f"""
        LoRA has two rates, that of the adapters and that of the heads. So that the full fine-tune has two settings as
        well, its decay by layer, `model.llrd`, was chosen together with its rate: at best it reached {told}.
    """


def beyond(facts: Facts) -> str:
    """`better rates may lie beyond those tried for head and lora_r16, not for full`."""
    groups: dict[bool, list[str]] = {True: [], False: []}
    for tuning in facts["tuning"]:
        groups[bool(tuning["edges"])].append(f"`{tuning['variant']}`")
    if not groups[True]:
        return "no rate is at the edge of those that were tried"
    if not groups[False]:
        return "better rates may lie beyond those that were tried for every variant"
    return (
        f"better rates may lie beyond those that were tried for {listed(groups[True])}, not for {listed(groups[False])}"
    )


def listed(words: Sequence[str]) -> str:
    """`a, b and c`."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if words[1:] else words)


def dusk_run(facts: Facts) -> str:
    source, data = facts["source_network"], facts["data"]
    return f"""
        A network for the day, a full fine-tune from the same DINOv2 on the {source["train_images"]} images of the day
        sequences ({source["steps"]} steps), is adapted to dusk: {data["train_images"]} images to train on, the
        {data["val_images"]} that follow them in time to validate, {facts["steps"]} steps of two 256x256 crops, at rates
        chosen for each variant on held-out training images. {len(facts["seeds"])} seeds. What was forgotten is the
        change on the {source["val_images"]} validation images of the day:
    """


def dusk_findings(facts: Facts) -> str:
    rows = by_variant(facts)
    gained = rows["lora_r16"]["miou_percent"] - rows["none"]["miou_percent"]
    changes = (
        f"{words} {points(rows[name]['source_change_points'])}"
        for name, words in {"full": "the full fine-tune", **NAMES}.items()
        if name in rows
    )
    return f"""
        LoRA at rank 16 gains {gained:.1f} points at dusk. {against_full(rows)} On the day the networks
        change, in points: {listed(list(changes))}. Read with care: {beyond(facts)}; rates were chosen on
        {facts["tuning"][0]["data"]["val_images"]} images; and {facts["data"]["val_images"]} neighbouring frames of one
        sequence judge it all.
    """


def dusk_brief(facts: Facts) -> str:
    rows = by_variant(facts)
    start = rows["none"]["miou_percent"]
    gains = [rows[name]["miou_percent"] - start for name in ("lora_r16", "full")]
    changes = [points(rows[name]["source_change_points"]) for name in ("lora_r16", "full")]
    return f"""
        Adapted from day to dusk on {facts["data"]["train_images"]} images, LoRA at rank 16 gains {gains[0]:.1f} points
        and the full fine-tune {gains[1]:.1f}; of the day they forget: {changes[0]} and {changes[1]} points.
    """


def few_brief(facts: Facts) -> str:
    found = [
        f"with {part['training_images']} images {difference(by_variant(part)['lora_r16'])}"
        for part in facts["fewer_images"]
    ]
    return f"""
        On fewer training images, LoRA at rank 16 minus the full fine-tune in points, with the 95 % interval:
        {listed(found)}; one subset of each size, {len(facts["seeds"])} seeds.
    """


def few_run(facts: Facts) -> str:
    counts = [part["training_images"] for part in facts["fewer_images"]]
    return f"""
        The same {facts["steps"]} steps with {listed([str(count) for count in counts])} of the
        {facts["training_images"]} images, the fewer among the more, at the rates that were chosen with all of them:
    """


def few_findings(facts: Facts) -> str:
    parts = [*facts["fewer_images"], {"training_images": facts["training_images"], "table": facts["table"]}]
    told = (f"* {part['training_images']} images: {against_full(by_variant(part))}" for part in parts)
    return "\n".join(told)


def saved(rows: dict[str, Facts], name: str, variant: str = "lora_r16") -> float:
    """What a step of LoRA saves of a full one's, as a share."""
    full, lora = (
        sum(row[key] for key in row if key.endswith("_seconds_per_step")) if name == "seconds" else row[name]
        for row in (rows["full"], rows[variant])
    )
    return 1 - lora / full


def tuned(facts: Facts) -> str:
    """What was chosen for each variant, and its mIoU on the held-out training images."""
    keys = list(dict.fromkeys(key for tuning in facts["tuning"] for key in tuning["chosen"]))
    names = {"lowest": ", the lowest", "highest": ", the highest"}
    rows = []
    for tuning in facts["tuning"]:
        chosen = {key: f"{value:g}{names.get(tuning['edges'].get(key), '')}" for key, value in tuning["chosen"].items()}
        best = max(trial["miou"] for trial in tuning["trials"] if trial["miou"] is not None)
        cells = (chosen.get(key, NONE) for key in keys)
        rows.append([f"`{tuning['variant']}`", *cells, str(len(tuning["trials"])), f"{100 * best:.2f}"])
    titles = ["variant", *(f"`{key}`" for key in keys), "trials", "mIoU on held-out images, %"]
    return markdown(titles, rows)


def audits(facts: Facts) -> list[str]:
    return [run["lora_audit"] for run in facts["runs"] if run["variant"].startswith("lora")]


def claim_memory(facts: Facts) -> str:
    rows = by_variant(facts)
    peaks = [f"{mebibytes(rows[name]['peak_memory_bytes'])} MiB" for name in ("full", "lora_r16", "lora_last_k")]
    return f"""
        Peak memory of the process: {peaks[0]} in full, {peaks[1]} with LoRA, {peaks[2]} with LoRA in the last three
        blocks. Gradients and the optimiser's state nearly vanish, but activations stay.
    """


def claim_memory_large(facts: Facts) -> str:
    full, lora, last = (facts["variants"][name][0]["peak"] / 2**30 for name in ("full", "LoRA", "LoRA, last 4"))
    return f"""
        By count, a step of a ViT-L with one image of 1024x1024 keeps {full:.1f} GiB in full, {lora:.1f} GiB with LoRA
        and {last:.1f} GiB with LoRA in the last four blocks.
    """


def claim_time(facts: Facts) -> str:
    rows = by_variant(facts)
    return f"""
        A step with LoRA takes {percentage(saved(rows, "seconds"))} less time than a full one,
        {percentage(saved(rows, "seconds", "lora_last_k"))} less with LoRA in the last three blocks alone,
        {percentage(saved(rows, "seconds", "head"))} less with heads alone. Each was timed once, in 30 steps; the last
        two take nearly as many operations, so what lies between them is the noise of such a measurement.
    """


def claim_base(facts: Facts) -> str:
    found = audits(facts)
    passed = sum(words == "10 of 10 passed" for words in found)
    return f"""
        In {passed} of {len(found)} runs with LoRA all frozen weights were bit-identical after training to those before.
    """


def claim_score(facts: Facts) -> str:
    rows = by_variant(facts)
    return f"""
        With all {facts["training_images"]} training images, three seeds. {against_full(rows)}
    """


def claim_few(facts: Facts) -> str:
    return few_findings(facts)
