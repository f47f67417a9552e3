"""Five minutes on a CPU: a tiny network learns clear weather, then night and fog, with and without LoRA."""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # also runs from a checkout that is not installed

from eomt.command_line import quiet_libraries  # noqa: E402

PRECISION = "32-true"  # 16 bits are slow on most CPUs
VARIANTS = {  # name in the table: what it trains
    "source": ["experiment=toy_source"],
    "full fine-tune": ["experiment=toy_night", "variant=full"],
    "LoRA": ["experiment=toy_night", "variant=lora_r16"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "outputs" / "demo" / time.strftime("%Y-%m-%d_%H-%M-%S"))
    parser.add_argument("overrides", nargs="*", help="passed to every run, for example trainer.max_epochs=1")
    arguments = parser.parse_args()
    started = time.time()

    runs = {name: arguments.output / overrides[-1].split("=")[1] for name, overrides in VARIANTS.items()}
    for name, overrides in VARIANTS.items():
        start = [] if name == "source" else [f"model.ckpt_path='{runs['source'] / 'model'}'"]
        train([*overrides, *start, *arguments.overrides], runs[name])

    quiet_libraries()
    artefacts = {name: artefact(run) for name, run in runs.items()}
    rows = [row(name, runs[name], module) for name, module in artefacts.items()]
    (arguments.output / "table.json").write_text(json.dumps(rows, indent=2) + "\n")
    print_table(rows)
    picture = draw(artefacts, arguments.output / "night_fog.png")
    print(f"{time.time() - started:.0f} seconds in all; what each network sees at night: {picture}")


def train(overrides: list[str], output_dir: Path) -> None:
    """One run, the way a user starts it."""
    command = [sys.executable, str(ROOT / "train_with_lora.py"), f"output_dir='{output_dir}'"]
    command += [f"trainer.precision={PRECISION}", *overrides]
    print("\n$ " + " ".join(["python", "train_with_lora.py", *command[2:]]), flush=True)
    subprocess.run(command, check=True)


def artefact(run: Path):  # noqa: ANN201
    """The network that a run saved."""
    from eomt.training.mask_classification_semantic import MaskClassificationSemantic

    folder = json.loads((run / "summary.json").read_text())["artefact"]
    return MaskClassificationSemantic.from_pretrained(run / folder)


def row(name: str, run: Path, module) -> dict:  # noqa: ANN001
    """What a run cost, and what its artefact is worth in both domains."""
    from eomt.training.evaluation import evaluate

    summary = json.loads((run / "summary.json").read_text())
    return {
        "variant": name,
        "miou_clear": evaluate(module, streets("clear", module), PRECISION).miou,
        "miou_night_fog": evaluate(module, streets("night_fog", module), PRECISION).miou,
        "trainable_parameters": summary["trainable_parameters"],
        "artefact_bytes": sum(n for file, n in summary["files"].items() if file.startswith(summary["artefact"] + "/")),
        "peak_memory_bytes": summary["peak_memory"]["bytes"],
        "seconds_per_step": summary["seconds_per_step"]["total"],
    }


def streets(domain: str, module):  # noqa: ANN001, ANN201
    from eomt.data.toy_streets import toy_streets

    return toy_streets(domain=domain, img_size=module.hparams.img_size, num_workers=0)


def draw(artefacts: dict, path: Path) -> Path:
    """Image, target, and what each network predicts, for a few scenes at night."""
    from eomt.inference.windows import segment
    from eomt.reporting.pictures import prediction_picture

    dataset = streets("night_fog", artefacts["source"]).val_set
    scenes = [dataset[i] for i in range(0, len(dataset), len(dataset) // 4)][:4]
    rows = [
        (image, labels, *(segment(module.network, image).argmax(0).byte() for module in artefacts.values()))
        for image, labels in scenes
    ]
    prediction_picture(rows, dataset.classes, path, columns=("image", "target", *artefacts))
    return path


def print_table(rows: list[dict]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Clear weather to night and fog, from the same source network, data, steps and seed")
    table.add_column("variant")
    columns = "mIoU clear", "mIoU night/fog", "trainable parameters", "artefact", "peak memory", "s per step"
    for column in columns:
        table.add_column(column, justify="right")
    for values in rows:
        table.add_row(
            values["variant"],
            f"{100 * values['miou_clear']:.1f}",
            f"{100 * values['miou_night_fog']:.1f}",
            f"{values['trainable_parameters']:,}",
            f"{values['artefact_bytes'] / 2**20:.2f} MiB",
            f"{values['peak_memory_bytes'] / 2**30:.2f} GiB",
            f"{values['seconds_per_step']:.3f}",
        )
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
