"""Trains a tiny network on clear weather, then on night and fog with and without LoRA, and compares the three."""

import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from eomt.command_line import quiet_libraries, quoted
from eomt.files import write_json
from eomt.inference.saved import shipped
from eomt.places import TRAIN, as_typed
from eomt.settings.formats import SUMMARY, read_format

if TYPE_CHECKING:  # torch is imported once the runs have ended
    from eomt.data.datamodule import SegmentationDataModule
    from eomt.training.mask_classification_semantic import MaskClassificationSemantic

PRECISION = "32-true"  # 16 bits are slow on most CPUs
COLUMNS = ("variant", "mIoU clear", "mIoU night/fog", "trainable parameters", "artefact", "peak memory", "s per step")
VARIANTS = {  # name in the table: what it trains
    "source": ["experiment=toy_source"],
    "full fine-tune": ["experiment=toy_night", "variant=full"],
    "LoRA": ["experiment=toy_night", "variant=lora_r16"],
}


def run_demo(output: Path, overrides: Sequence[str] = (), json: Path | None = None) -> int:
    """Trains the three networks, prints a table of them, and writes it as table.json and what they see as a picture.

    Args:
        output: folder of the runs, of `table.json` and `night_fog.png`.
        overrides: for every run, for example `trainer.max_epochs=1`.
        json: another place for what `table.json` holds.

    Returns:
        0, or the exit code of the run that failed, which has said why.
    """
    started = time.time()
    runs = {name: output / words[-1].split("=")[1] for name, words in VARIANTS.items()}
    for name, words in VARIANTS.items():
        start = [] if name == "source" else [f"model.ckpt_path={quoted(runs['source'] / 'model')}"]
        if code := train([*words, *start, *overrides], runs[name]):
            return code
    quiet_libraries()
    networks = {name: open_network(run) for name, run in runs.items()}
    rows = [table_row(name, runs[name], network) for name, network in networks.items()]
    facts = described(runs) | {"seconds_in_all": round(time.time() - started), "rows": rows}
    for place in filter(None, (output / "table.json", json)):
        write_json(place, facts)
    print_table(rows)
    draw(networks, output / "night_fog.png")
    print(f"{facts['seconds_in_all']} seconds in all; what each network sees at night: {output}/night_fog.png")
    return 0


def train(overrides: Sequence[str], output_dir: Path) -> int:
    """Trains one network in a process of its own, as a user does, and returns the exit code."""
    command = [sys.executable, str(TRAIN), f"output_dir={quoted(output_dir)}"]
    command += [f"trainer.precision={PRECISION}", *overrides]
    print("\n$ " + as_typed(" ".join(["python train_with_lora.py", *command[2:]])), flush=True)
    return subprocess.run(command).returncode


def open_network(run: Path) -> "MaskClassificationSemantic":
    """Opens the network that a run saved."""
    from eomt.training.mask_classification_semantic import MaskClassificationSemantic

    return MaskClassificationSemantic.from_pretrained(shipped(run))


def table_row(name: str, run: Path, network: "MaskClassificationSemantic") -> dict[str, Any]:
    """Returns what a run cost, and the mIoU of its network in both domains, in [0, 1]."""
    from eomt.training.evaluation import evaluate

    summary = read_format(run / "summary.json", SUMMARY)
    return {
        "variant": name,
        "miou_clear": evaluate(network, streets("clear", network), PRECISION).miou,
        "miou_night_fog": evaluate(network, streets("night_fog", network), PRECISION).miou,
        "trainable_parameters": summary["trainable_parameters"],
        "artefact_bytes": sum(n for file, n in summary["files"].items() if file.startswith(summary["artefact"] + "/")),
        "peak_memory_bytes": summary["peak_memory"]["bytes"],
        "seconds_per_step": summary["seconds_per_step"]["total"],
    }


def described(runs: Mapping[str, Path]) -> dict[str, Any]:
    """Returns what the demo is, and where its figures come from."""
    from eomt.reporting.run_summary import provenance

    seeds = {read_format(run / "summary.json", SUMMARY)["seed"] for run in runs.values()}
    return {"what": "clear weather to night and fog, toy streets"} | provenance(sorted(seeds))


def streets(domain: str, network: "MaskClassificationSemantic") -> "SegmentationDataModule":
    """Opens the toy streets of a domain, for the network's image size."""
    from eomt.data.toy_streets import toy_streets

    return toy_streets(domain=domain, img_size=network.hparams.img_size, num_workers=0)


def draw(networks: "Mapping[str, MaskClassificationSemantic]", path: Path) -> None:
    """Writes a PNG of image, target and each network's prediction, for a few scenes at night."""
    from eomt.inference.windows import segment
    from eomt.reporting.pictures import prediction_picture

    dataset = streets("night_fog", networks["source"]).val_set
    scenes = [dataset[i] for i in range(0, len(dataset), len(dataset) // 4)][:4]
    rows = [
        (image, labels, *(segment(module.network, image).argmax(0).byte() for module in networks.values()))
        for image, labels in scenes
    ]
    prediction_picture(rows, dataset.classes, path, columns=("image", "target", *networks))


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Prints a line for each network; scores in %, sizes in MiB and GiB."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in COLUMNS:
        heading = "\n".join(column.rsplit(" ", 1))  # the whole table fits 80 columns
        table.add_column(heading, justify="left" if column == COLUMNS[0] else "right", no_wrap=True)
    for row in rows:
        table.add_row(*texts(row))
    print("\nClear weather to night and fog: the same source network, data, steps, and seed")
    Console().print(table)


def texts(row: Mapping[str, Any]) -> list[str]:
    """Returns the cells of a network's line, under `COLUMNS`."""
    return [
        row["variant"],
        f"{100 * row['miou_clear']:.1f}",
        f"{100 * row['miou_night_fog']:.1f}",
        f"{row['trainable_parameters']:,}",
        f"{row['artefact_bytes'] / 2**20:.2f} MiB",
        f"{row['peak_memory_bytes'] / 2**30:.2f} GiB",
        f"{row['seconds_per_step']:.3f}",
    ]
