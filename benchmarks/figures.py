"""Tables and sentences with figures of README and docs, but those about speed: each from what its JSON file holds."""

from collections.abc import Callable

from benchmarks.words import Facts, markdown, number, span
from eomt.comparison import demo as toy_demo
from eomt.comparison.statistics import Delta
from eomt.comparison.table import NONE, interval_text, mebibytes, percent, percentage


def by_variant(facts: Facts) -> dict[str, Facts]:
    return {row["variant"]: row for row in facts["table"]}


# demo


def demo(facts: Facts) -> str:
    return markdown(toy_demo.COLUMNS, [toy_demo.texts(row) for row in facts["rows"]])


def demo_run(facts: Facts) -> str:
    machine = facts["machine"]
    return f"""
        `make demo` on {machine["threads"]} threads of an {machine["processor"]} (seed {facts["seeds"][0]},
        {facts["seconds_in_all"]} seconds in all, [benchmarks/demo.json](benchmarks/demo.json)):
    """


# matrices of compare.py


def matrix(facts: Facts) -> str:
    """Variants by row: scores, what they cost; the table of a `report.json`, columns without a value left out."""
    baseline = next(row["variant"] for row in facts["table"] if row["reading"] == "baseline")
    columns: dict[str, Callable[[Facts], str]] = {
        "variant": lambda row: f"`{row['variant']}`",
        "mIoU, %": miou,
        f"difference to `{baseline}` (95 % interval), points": difference,
        "change on source, points": lambda row: points(row.get("source_change_points")),
        "trainable parameters": parameters,
        "artefact, MiB": lambda row: mebibytes(row.get("artefact_bytes")),
        "peak memory, MiB": lambda row: mebibytes(row.get("peak_memory_bytes")),
        "s per step": seconds_per_step,
        "GFLOP per step": lambda row: number(row.get("flops_per_step"), ",.1f", 1e-9),
    }
    cells = {title: [cell(row) for row in facts["table"]] for title, cell in columns.items()}
    shown = {title: column for title, column in cells.items() if set(column) != {NONE}}
    return markdown(list(shown), list(zip(*shown.values(), strict=True)))


def images(facts: Facts) -> str:
    """Variants by row, numbers of training images by column: mIoU and the difference to the baseline."""
    parts = [*facts["fewer_images"], {"training_images": facts["training_images"], "table": facts["table"]}]
    variants = dict.fromkeys(row["variant"] for part in parts for row in part["table"])
    columns = [{row["variant"]: f"{miou(row)}; {difference(row)}" for row in part["table"]} for part in parts]
    rows = [[f"`{name}`", *(column.get(name, NONE) for column in columns)] for name in variants]
    return markdown(["variant", *(f"{part['training_images']:,} images" for part in parts)], rows)


def miou(row: Facts) -> str:
    sd = row.get("miou_sd")
    return number(row["miou_percent"], ".2f") + (f" ± {sd:.2f}" if sd is not None else "")


def difference(row: Facts) -> str:
    """`−1.64 (−2.34 to −0.63)`, or `baseline`."""
    if row["reading"] == "baseline" or row.get("difference_points") is None:
        return "baseline" if row["reading"] == "baseline" else NONE
    ends = [row.get(f"{end}_points") for end in ("difference", "low", "high")]
    return interval_text(Delta(*(end if end is None else end / 100 for end in ends)))


def parameters(row: Facts) -> str:
    count, share = row.get("trainable_parameters"), row.get("trainable_share")
    return number(count, ",.0f") + (f" ({percentage(share)})" if count and share is not None else "")


def seconds_per_step(row: Facts) -> str:
    parts = [row.get(f"{part}_seconds_per_step") for part in ("compute", "data")]
    return NONE if None in parts else f"{sum(parts):.3f}"


def points(value: float | None) -> str:
    return percent(None if value is None else value / 100, signed=True)


# anomalies


def anomalies(facts: Facts) -> str:
    """mIoU, and AuPRC and FPR95 by two scores, of a `report.json` of one benchmark; last a score that knows nothing."""
    (name, chance), metrics = *facts["chance"].items(), {"auprc": "AuPRC", "fpr95": "FPR95"}
    keys = [f"{name}_{score}{metric}" for score in ("", "max_logit_") for metric in metrics]
    titles = [f"`{score}`: {words}, %" for score in ("rba", "max_logit") for words in metrics.values()]
    rows = [
        [f"`{row['variant']}`", *(f"{row[f'{key}_percent']:.1f} ± {row[f'{key}_sd']:.1f}" for key in ("miou", *keys))]
        for row in facts["table"]
    ]
    nothing = ["chance", NONE, *[f"{100 * chance['auprc']:.2f}", f"{100 * chance['fpr95']:.0f}"] * 2]
    return markdown(["variant", "mIoU, %", *titles], [*rows, nothing])


def chance_auprc(facts: Facts) -> str:
    """The share of anomalous pixels in percent, which is the AuPRC of a score that knows nothing."""
    return f"{100 * facts['chance']['toy_anomalies']['auprc']:.2f}"


def anomalies_brief(facts: Facts) -> str:
    rows = by_variant(facts)
    costs = [-rows[name]["difference_points"] for name in ("rba", "rba_lora")]
    auprc = [rows[name]["toy_anomalies_auprc_percent"] for name in ("rba", "rba_lora")]
    by_rba, by_max_logit = (rows["rba"][f"toy_anomalies_{score}fpr95_percent"] for score in ("", "max_logit_"))
    return f"""
        Pasted objects of other kinds (`rba`) teach the networks to reject what they never saw: an AuPRC of
        {auprc[0]:.1f} % and, with LoRA, {auprc[1]:.1f} %, for {span(costs, ".1f")} points of mIoU, where chance is
        {chance_auprc(facts)} %. By `rba` itself FPR95 is hardly better than chance, {by_rba:.0f} %; by
        `max_logit` it is {by_max_logit:.0f} %. ArcFace alone does not help here, and costs mIoU: its class head
        starts afresh, the others' do not.
    """


def anomalies_run(facts: Facts) -> str:
    return f"""
        {len(facts["table"])} variants, {len(facts["seeds"])} seeds, 148 steps each from the same network, on an
        {facts["machine"]["processor"]}; mean ± sample standard deviation
        ([benchmarks/toy_anomalies.json](../benchmarks/toy_anomalies.json) has every seed, `msp`, `max_entropy` and
        components, too). {chance_auprc(facts)} % of the pixels are anomalous, which is the AuPRC of chance; its FPR95
        is 95 %.
    """


def anomalies_findings(facts: Facts) -> str:
    rows = by_variant(facts)
    rba, lora = rows["rba"], rows["rba_lora"]
    name = "toy_anomalies_auprc"
    times = rba[f"{name}_percent"] / rows["baseline"][f"{name}_percent"]
    low, high = (rba[f"{name}_{end}_points"] for end in ("low", "high"))
    by_rba, by_max_logit = (rba[f"toy_anomalies_{score}fpr95_percent"] for score in ("", "max_logit_"))
    return f"""
        * RbA with cut-paste has {times:.0f} times the baseline's AuPRC ({rba[f"{name}_difference_points"]:.1f} points
        more, {low:.1f} to {high:.1f}), for {-rba["difference_points"]:.1f} points of mIoU. With LoRA it is
        {lora[f"{name}_difference_points"]:.1f} points more than the baseline, for {-lora["difference_points"]:.1f}
        points.
        * The score matters as much: `rba` sums over classes, so that doubtful pixels between two known classes look
        well known. It ranks the surest anomalies best and misses the last ones: FPR95 is {by_rba:.0f} % by `rba`
        and {by_max_logit:.0f} % by `max_logit`, for the same network.
    """


# coverage


def coverage_run(facts: Facts) -> str:
    return f"""
        On drawn scores whose true difference is known (100 images; the figures are the share of {facts["trials"]:,}
        intervals of 95 % that hold it, [benchmarks/coverage.json](../benchmarks/coverage.json)):
    """


def coverage_by_seeds(facts: Facts) -> str:
    """How often the interval holds, by what is drawn again, for each deviation and number of seeds."""
    seeds = list(dict.fromkeys(row["seeds"] for row in facts["by_seeds"]))
    ratios = dict.fromkeys(row["seed_sd_in_standard_errors_of_images"] for row in facts["by_seeds"])
    lines = []
    for ratio in ratios:
        rows = [row for row in facts["by_seeds"] if row["seed_sd_in_standard_errors_of_images"] == ratio]
        for drawn in ("images alone", "seeds and images"):
            lines.append([f"{ratio:g}", drawn, *(f"{100 * row[drawn]:.1f} %" for row in rows)])
    titles = [f"{count} seed{'s' * (count > 1)}" for count in seeds]
    return markdown(["deviation of seeds / standard error of images", "drawn again", *titles], lines)


def coverage_by_correlation(facts: Facts) -> str:
    lines: dict[float, list[str]] = {}
    for row in facts["by_correlation"]:
        lines.setdefault(row["correlation_of_neighbours"], []).append(f"{100 * row['seeds and images']:.1f} %")
    titles = ["correlation of neighbours", "every image by itself", "blocks of up to 10 frames"]
    return markdown(titles, [[f"{rho:g}", *shares] for rho, shares in lines.items()])


# what is counted


def pixels(facts: Facts) -> str:
    def cell(average: float, extreme: float) -> str:
        return f"{100 * average:.1f} % ({100 * extreme:.1f} %)"

    return markdown(
        ["", "share at 0 or 255, average (largest image)", "normalised and saved (smallest image)"],
        [
            [
                f"{name}, {found['images']} images",
                cell(found["average"], found["largest"]),
                cell(found["average_normalised"], found["smallest_normalised"]),
            ]
            for name, found in facts["data"].items()
        ],
    )


TRAINED = {  # the words of docs/lora.md for the variants of cost.json
    "full": "everything",
    "LoRA": "LoRA on `qkv` and `attn.proj`, all blocks",
    "LoRA, last 4": "LoRA in the last 4 blocks",
    "LoRA, last 4, checkpoint_predictions": "the same, `model.checkpoint_predictions=true`",
    "frozen": "nothing",
}


def cost(facts: Facts) -> str:
    """Operations, activations and peak memory of a step with one image."""
    found = {name: facts["variants"][name][0] for name in TRAINED}
    rows = []
    for name, words in TRAINED.items():
        saved = f" (-{percentage(1 - found[name]['flops'] / found['full']['flops'])})" * (name != "full")
        memory = [f"{found[name][part] / 2**30:.1f} GiB" for part in ("activations", "peak")]
        rows.append([words, f"{found[name]['flops'] / 1e12:.1f}{saved}", *memory])
    return markdown(["trained backbone part", "TFLOP per step", "activations", "peak memory"], rows)


def bases(facts: Facts) -> str:
    """Memory of a step with LoRA on bases that are too large for most cards, by how their weights are kept."""
    titles = {"vit_giant": "ViT-g (`model=vit_giant`)", "vit_7b_dinov3": "DINOv3 7B (`model=vit_7b_dinov3`)"}
    cells = [
        [
            f"{found['peak'] / 2**30:.1f}, of it {found['weights'] / 2**30:.1f}"
            for found in (facts["bases"][model][base] for model in titles)
        ]
        for base in facts["bases"]["vit_giant"]
    ]
    names = [name if name == "float32" else f"`{name}`" for name in facts["bases"]["vit_giant"]]
    titles = ["base, memory in GiB", *titles.values()]
    return markdown(titles, [[name, *row] for name, row in zip(names, cells, strict=True)])


def cost_findings(facts: Facts) -> str:
    kept = {name: costs[0]["activations"] / 2**30 for name, costs in facts["variants"].items()}
    return f"""
        LoRA saves gradient and optimiser memory and checkpoint bytes. The forward pass costs as much as before, so a
        step is not ten times faster. The queries need a backward pass through the last blocks anyway, which makes LoRA
        in the last blocks nearly free. The mask predictions hold much of the activations that are left: checkpointing
        them saves {kept["LoRA, last 4"] - kept["LoRA, last 4, checkpoint_predictions"]:.1f} GiB of activations, LoRA in
        all blocks {kept["full"] - kept["LoRA"]:.1f}.
    """


def sizes_of_vit_large(facts: Facts) -> str:
    trained = facts["variants"]["LoRA"][0]["trained"]
    everything = facts["variants"]["LoRA"][0]["parameters"]
    return f"""
        In a ViT-L at rank 16 the adapter is {4e-6 * trained["adapters"]:.1f} MB, with heads
        {4e-6 * sum(trained.values()):.0f} MB, beside a backbone of {4e-9 * everything["backbone"]:.1f} GB
        ([docs/lora.md](docs/lora.md)).
    """


def recipe_in_parts(facts: Facts) -> str:
    two = facts["variants"]["full"][1]["activations"] / 2**30
    return f"""
        That is the published recipe: 16 crops of 1024x1024 a step, more than one card holds. Take the step in parts,
        with
        `data.batch_size=2 trainer.accumulate_grad_batches=8` (about {two:.0f} GiB of activations by count), or take
        smaller crops, too: `"model.img_size=[640,640]" data.batch_size=4 trainer.accumulate_grad_batches=4`.
    """


def recipe_on_a_card(facts: Facts) -> str:
    full, lora = (facts["variants"][name][0] for name in ("full", "LoRA"))
    state = full["weights"] + full["optimizer"]
    return f"""
        Both take the same settings: only then can they stand in one table. The published recipe, 16 crops of 1024x1024
        a step, keeps {full["activations"] / 2**30:.1f} GiB of activations for each crop by count (LoRA:
        {lora["activations"] / 2**30:.1f}), more than any one card has; `data.batch_size=2
        trainer.accumulate_grad_batches=8` takes the same step in eight parts, for cards of 40 GB. None of this was
        measured on a GPU here. A full run keeps three copies of a ViT-L, the checkpoints with its optimiser:
        {(2 * state + full["weights"]) / 1e9:.0f} GB.
    """
