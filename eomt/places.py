"""Where the project's own files are: beside the package in a checkout, inside it where it was installed."""

import re
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
INSTALLED = (PACKAGE / "configs").is_dir()  # from a wheel, without a checkout
ROOT = PACKAGE if INSTALLED else PACKAGE.parent
CONFIGS, SCRIPTS = ROOT / "configs", ROOT / "scripts"
TRAIN = PACKAGE.parent / "train_with_lora.py"

COMMANDS = {  # of `eomt`: the script, the words that it stands for, what it does
    "train": ("train_with_lora", (), "train EoMT, as a full fine-tune or with LoRA"),
    "evaluate": ("evaluate", (), "the mIoU of a saved network on a data set"),
    "predict": ("predict", (), "class maps and overlays of images, folders, videos"),
    "compare": ("compare", (), "a matrix of fair runs: run, evaluate, report"),
    "report": ("compare", ("report",), "one report about finished runs"),
    "inspect": ("inspect_model", (), "what trains, and whether the adapters work"),
    "merge": ("merge_lora", (), "an adapter merged into its base"),
    "convert": ("convert", (), "to and from transformers, ONNX, torch.export"),
    "extract": ("extract_lora", (), "an adapter from a finished full fine-tune"),
    "publish": ("publish", (), "an adapter to the hub, with its model card"),
    "cost": ("cost", (), "parameters, memory and FLOPs before training"),
    "doctor": ("doctor", (), "what is wrong with a run, its data, this machine"),
    "data": ("dataset_report", (), "what is in a data set, and what is wrong with it"),
    "import-masks": ("import_masks", (), "exports of COCO, Label Studio, CVAT as masks"),
    "cut-paste": ("make_cut_paste", (), "images with pasted objects, for outliers"),
    "anomaly": ("evaluate_anomaly", (), "a saved network on anomaly benchmarks"),
    "demo": ("demo", (), "five minutes on a CPU, with and without LoRA"),
}


def script_path(script: str) -> Path:
    """The file of a script of COMMANDS."""
    return TRAIN if script == TRAIN.stem else SCRIPTS / f"{script}.py"


def as_typed(text: str, installed: bool = INSTALLED) -> str:
    """A text that names commands as a user has them: `eomt train` for `python train_with_lora.py` where installed."""
    if not installed:
        return text
    names = {script: f"eomt {name}" for name, (script, words, _) in COMMANDS.items() if not words}
    paths = "|".join(map(re.escape, names))
    return re.sub(rf"(?:python )?(?:scripts/)?\b({paths})\.py\b", lambda found: names[found[1]], text)
