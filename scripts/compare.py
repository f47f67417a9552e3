"""With or without LoRA? A matrix of fair runs, and one report about it.

`run` trains every variant with every seed from the same weights, on the same crops in the same order, for the same
number of steps, and evaluates what the last step left. Run the same command again to continue an interrupted matrix.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from _data import ROOT, build_data, data_of_run, open_data

from eomt.command_line import one_sentence, quiet_libraries

if TYPE_CHECKING:
    from torch import Tensor

VARIANTS = sorted(path.stem for path in (ROOT / "configs" / "variant").glob("*.yaml") if path.stem != "base")
OWN_KEYS = {  # what a matrix sets itself, or what would make its runs unequal
    "variant": "give variants=[...]",
    "seed": "give seeds=[...]",
    "resume": "the same command again continues a matrix",
    "callbacks.save_best.keep": "a matrix keeps the network of the last step",
    "patience": "runs must have equally many steps",
    "trainer.max_time": "runs must have equally many steps",
    "trainer.fast_dev_run": "runs must be whole",
    "trainer.limit_val_batches": "runs are scored on all images",
}
TOYS = "toy_anomalies"  # the benchmark that is drawn where it is needed
EXAMPLES = f"""examples:
  python scripts/compare.py run experiment=toy_night "variants=[none,head,lora_r8,full]" "seeds=[0,1,2]"
  python scripts/compare.py run experiment=camvid_dusk "variants=[none,lora_r8,full]" "seeds=[0,1,2]" \\
      data.root=/data/camvid source="experiment=camvid_day data.root=/data/camvid" output_dir=outputs/compare/dusk
  python scripts/compare.py run --config-name cityscapes data.root=/data/cityscapes "devices=[0,1,2,3]" \\
      "variants=[lora_r16,full]" "seeds=[0,1,2]" hydra/launcher=joblib        # one run on each of four GPUs
  python scripts/compare.py run experiment=toy_anomalies "variants=[baseline,rba,arcface,arcface_rba]" \\
      "anomaly=[toy_anomalies]"
  python scripts/compare.py report outputs/compare/dusk --baseline full

variants: {", ".join(VARIANTS)} (configs/variant/)"""
RUN_HELP = """variants=[...]   what trains (default: none, head, lora_r8, lora_r16, full)
seeds=[...]      default: 0
source="..."     the data that the start weights come from, to measure what is forgotten:
                 "experiment=NAME data.root=..." or "data=NAME data.key=value ..."
anomaly=[...]    anomaly benchmarks to score every network on: toy_anomalies, road_anomaly_21, ...
anomaly_root=... folder that holds those benchmarks; toy_anomalies need none
devices=[...]    GPUs to share out; with hydra/launcher=joblib one run on each at a time
output_dir=...   the matrix's folder (default: outputs/compare/EXPERIMENT); it holds VARIANT/seed_N/
hydra/launcher=  joblib or submitit_slurm (extra: launchers); default: one run after another
anything else    is passed to train_with_lora.py: experiment=NAME, data.root=..., trainer.max_epochs=..."""


def main() -> int:
    """Exit code 0; 1 with one sentence, or when a cell failed; 2 for a mistyped command."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLES, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="train and evaluate a matrix", description=RUN_HELP, formatter_class=raw)
    run.add_argument("overrides", nargs="*", metavar="key=value")
    run.add_argument("--config-name", default="cityscapes", help="of train_with_lora.py (default: %(default)s)")
    report = commands.add_parser("report", help="one table, plots and pictures: HTML, Markdown, CSV, LaTeX")
    report.add_argument("runs", nargs="+", type=Path, help="matrix folders, or folders of single runs")
    report.add_argument("--baseline", help="the variant that others are compared to (default: full or baseline)")
    report.add_argument("--score", help="of anomalies, one for the whole table (default: rba)")
    report.add_argument("--output", type=Path, help="default: report/ in the first folder")
    report.add_argument("--allow-different", action="store_true", help="mark runs that differ instead of stopping")
    evaluate = commands.add_parser("evaluate", help="evaluate a run for the report (run and report do it as needed)")
    evaluate.add_argument("run", type=Path)
    evaluate.add_argument("source", nargs="*", metavar="key=value", help="the source domain, as in source= above")
    args = parser.parse_args(options_first(sys.argv[1:]))

    from hydra.errors import HydraException

    try:
        if args.command == "run":
            return run_matrix(args.overrides, args.config_name)
        if args.command == "evaluate":
            evaluate_run(args.run, args.source)
            return 0
        return report_runs(args)
    except (ValueError, OSError, HydraException) as error:
        hint = "; pip install -e .[launchers] brings joblib and submitit" if "hydra/launcher" in str(error) else ""
        print(f"error: {one_sentence(error)}{hint}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted: the same command goes on from here", file=sys.stderr)
        return 130


def options_first(words: Sequence[str]) -> list[str]:
    """`--config-name` may stand behind overrides, as for train_with_lora.py; argparse wants it in front of them."""
    words = list(words)
    for i, word in enumerate(words):
        if words[0] == "run" and word.startswith("--config-name"):
            option = words[i : i + 1 if "=" in word else i + 2]
            return ["run", *option, *words[1:i], *words[i + len(option) :]]
    return words


# The matrix


@dataclass
class Cell:
    """What Hydra sweeps over: one run of a matrix."""

    variant: str
    seed: int
    matrix: str


def run_matrix(overrides: Sequence[str], config_name: str) -> int:
    """Checks everything, writes `matrix.json`, and lets Hydra's launcher run the cells."""
    import hydra
    from hydra.core.config_store import ConfigStore

    facts, launcher = parse_matrix(overrides, config_name)
    folder = Path(facts.pop("folder"))
    facts = continue_matrix(folder, facts)
    check_matrix(facts)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "matrix.json", facts)

    ConfigStore.instance().store("cell", node={"variant": "???", "seed": "???", "matrix": "???"})
    os.environ["HYDRA_FULL_ERROR"] = "1"  # so that a mistyped launcher arrives here and not as Hydra's own page
    sys.argv[1:] = ["--multirun", *sweep(folder, facts), *launcher]
    try:
        hydra.main(config_path=None, config_name="cell", version_base="1.3")(run_cell)()
    except RuntimeError as error:  # a cluster's job that was ended from outside
        print(f"error: {one_sentence(error)}", file=sys.stderr)
    return summarise(folder, facts)


def parse_matrix(overrides: Sequence[str], config_name: str) -> tuple[dict[str, Any], list[str]]:
    """The matrix that the command line asks for, and the overrides that are for Hydra's launcher."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import OverrideParseException

    sources = [word for word in overrides if word.startswith("source=")]
    overrides = [word for word in overrides if word not in sources]
    try:
        parsed = OverridesParser.create().parse_overrides(overrides)
    except OverrideParseException as error:
        raise ValueError(one_sentence(error)) from error
    facts = {
        "variants": ["none", "head", "lora_r8", "lora_r16", "full"],
        "seeds": [0],
        "source": shlex.split(sources[-1].removeprefix("source=")) if sources else [],
        "anomaly": [],
        "anomaly_root": None,
        "devices": [],
        "config_name": config_name,
        "overrides": [],
    }
    launcher, folder = [], None
    for word, override in zip(overrides, parsed, strict=True):
        key = override.key_or_group
        if key in ("variants", "seeds", "devices", "anomaly"):
            value = override.value()
            value = getattr(value, "list", value)  # 0,1,2 is a sweep to Hydra
            facts[key] = list(dict.fromkeys(value if isinstance(value, (list, tuple)) else [value]))
        elif key == "output_dir":
            folder = override.value()
        elif key == "anomaly_root":
            facts[key] = os.path.abspath(os.path.expanduser(override.value()))
        elif key.startswith("hydra"):
            launcher.append(word)
        elif key in OWN_KEYS:
            raise ValueError(f"{word}: this is not for a matrix to be told: {OWN_KEYS[key]}")
        else:
            facts["overrides"].append(word)
    named = [word.split("=")[1] for word in facts["overrides"] if word.startswith("experiment=")]
    facts["folder"] = os.path.expanduser(folder or Path("outputs", "compare", *(named or [config_name])))
    return facts, launcher


def continue_matrix(folder: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """A matrix goes on in its folder, with further variants, seeds and benchmarks, but with nothing else changed."""
    if not (folder / "matrix.json").is_file():
        return facts
    before = json.loads((folder / "matrix.json").read_text())
    for key in ("config_name", "overrides", "source"):
        added = key == "source" and not before[key]  # the finished cells are evaluated there, too
        if before[key] != facts[key] and not added:
            raise ValueError(
                f"{folder} holds a matrix with {key} {before[key]}, now it is {facts[key]}: its runs would not be "
                "comparable; give the same, or another output_dir="
            )
    before = {"anomaly": [], "anomaly_root": None} | before
    for key in ("variants", "seeds", "anomaly"):
        facts[key] = [*before[key], *(value for value in facts[key] if value not in before[key])]
    facts["anomaly_root"] = facts["anomaly_root"] or before["anomaly_root"]  # which may have moved
    return facts


def check_matrix(facts: dict[str, Any]) -> None:
    """Every variant's configuration composes and passes the checks of a training run, before the first one starts.

    Adds to the facts what the overrides are for each variant: in a cell, Hydra composes nothing else.
    """
    from hydra import compose, initialize_config_dir
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from train_with_lora import absolute_paths, check

    if unknown := [name for name in facts["variants"] if name not in VARIANTS]:
        raise ValueError(f"variant {unknown[0]} is not in configs/variant: choose from {', '.join(VARIANTS)}")
    if not facts["variants"] or not all(isinstance(seed, int) for seed in facts["seeds"] or [None]):
        raise ValueError(f"variants {facts['variants']}, seeds {facts['seeds']}: at least one each, seeds are integers")
    configs: dict[str, Any] = {}  # by what they say of the data
    try:
        facts["overrides_of"] = {variant: overrides_for(variant, facts) for variant in facts["variants"]}
        for variant in facts["variants"]:
            words = [*facts["overrides_of"][variant], *fixed(variant, facts["seeds"][0], "run")]
            with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
                config = compose(facts["config_name"], words, return_hydra_config=True)
            HydraConfig.instance().set_config(config)
            del config.hydra
            check_variant(variant, config)
            absolute_paths(config)
            check(config)
            configs[OmegaConf.to_yaml(config.data)] = config
        for config in configs.values():
            build_data(config, "see --help").check_files()
        if facts["source"]:
            open_data(facts["source"], config.model.img_size, batch_size=1)
        check_benchmarks(facts["anomaly"], facts["anomaly_root"])
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(one_sentence(error)) from error


def check_benchmarks(names: Sequence[str], root: str | None) -> None:
    """Raises ValueError or FileNotFoundError where a benchmark is unknown, not there, or has labels of another."""
    from eomt.anomaly.datasets import BENCHMARKS, AnomalyDataset

    for name in names:
        if name not in BENCHMARKS:
            raise ValueError(f"anomaly={name} is no benchmark; choose from {', '.join(BENCHMARKS)}")
        if name != TOYS and root is None:
            raise ValueError(f"anomaly={name} needs anomaly_root=FOLDER, the folder that holds {name}'s own")
        if name != TOYS:
            AnomalyDataset(root, name).check()


def check_variant(variant: str, config: Any) -> None:
    """Raises ValueError where an override makes of a variant something else than its name says."""
    from omegaconf import OmegaConf

    wanted = OmegaConf.merge(config, alone(variant))
    for part in ("model", "trainer", "data"):
        found = OmegaConf.to_container(config[part], resolve=True)
        for key, value in OmegaConf.to_container(wanted[part], resolve=True).items():
            if value != found.get(key):
                raise ValueError(
                    f"{part}.{key}={found.get(key)} makes of variant {variant}, which has {value}, something "
                    "else than its name says: write it as a variant of its own in configs/variant/"
                )


def alone(variant: str) -> Any:
    """What a variant's file says."""
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return compose(overrides=[f"+variant={variant}"])


def overrides_for(variant: str, facts: dict[str, Any]) -> list[str]:
    """The matrix's overrides; how objects are pasted is nothing to a variant that pastes none."""
    pastes_none = alone(variant).get("data", {}).get("cut_paste", "the experiment's") is None
    return [word for word in facts["overrides"] if not (pastes_none and word.startswith("data.cut_paste."))]


def fixed(variant: str, seed: int, folder: Path | str) -> list[str]:
    """What a matrix sets for each run; the artefact of the last step is no choice among the evaluated images."""
    return [f"variant={variant}", f"seed={seed}", f"output_dir='{folder}'", "callbacks.save_best.keep=last"]


def sweep(folder: Path, facts: dict[str, Any]) -> list[str]:
    """Hydra's overrides: seeds outside, so that a matrix that stops early has whole comparisons."""
    return [
        f"seed={','.join(map(str, facts['seeds']))}",
        f"variant={','.join(facts['variants'])}",
        f"matrix='{folder.resolve()}'",
        f"hydra.sweep.dir='{folder.resolve()}'",
        "hydra.sweep.subdir=${variant}/seed_${seed}",
        "hydra.output_subdir=null",
        "hydra/job_logging=none",
        "hydra/hydra_logging=none",
    ]


# One cell


def run_cell(cell: Cell) -> None:
    """Runs one cell of the matrix, unless it is finished, or running in another process."""
    from filelock import FileLock, Timeout
    from hydra.core.hydra_config import HydraConfig

    matrix = Path(cell.matrix)
    facts = read_json(matrix / "matrix.json")
    folder = matrix / cell.variant / f"seed_{cell.seed}"
    count = len(facts["variants"]) * len(facts["seeds"])
    title = f"[{HydraConfig.get().job.num + 1}/{count}] {cell.variant}, seed {cell.seed}"
    try:
        with FileLock(matrix / f".{cell.variant}_{cell.seed}.lock", timeout=0):
            if finished(folder, facts):
                print(f"== {title}: finished before, kept", flush=True)
            else:
                train_and_evaluate(cell, title, matrix, facts, folder)
    except Timeout:
        print(f"== {title}: another process runs it, left alone", flush=True)


def train_and_evaluate(cell: Cell, title: str, matrix: Path, facts: dict[str, Any], folder: Path) -> None:
    """One cell, in processes of its own; whatever happens to it, the others go on."""
    print(f"== {title}", flush=True)
    script = [sys.executable, str(ROOT / "train_with_lora.py"), "--config-name", facts["config_name"]]
    train = [*script, *facts["overrides_of"][cell.variant], *fixed(cell.variant, cell.seed, folder), *resume(folder)]
    evaluate = [sys.executable, str(ROOT / "scripts" / "compare.py"), "evaluate", str(folder), *facts["source"]]
    folder.mkdir(parents=True, exist_ok=True)
    started = time.time()
    with one_device(matrix, facts["devices"]) as environment:
        error = None if status(folder) == "finished" else run_logged(train, folder / "run.log", environment)
        error = error or run_logged(evaluate, folder / "run.log", environment)
        anomaly_errors = {} if error else score_anomalies(folder, facts, environment)
    cell_facts = {"variant": cell.variant, "seed": cell.seed, "status": "failed" if error else "finished"}
    cell_facts |= {
        "error": error,
        "anomaly_errors": anomaly_errors,
        "command": ["python", "train_with_lora.py", *train[2:]],
    }
    write_json(folder / "cell.json", cell_facts)
    minutes, seconds = divmod(round(time.time() - started), 60)
    outcome = (
        f"failed: {error}" if error else "finished" + "".join(f", no scores: {e}" for e in anomaly_errors.values())
    )
    print(f"== {title}: {outcome} after {minutes} min {seconds} s", flush=True)


def read_json(path: Path) -> dict[str, Any]:
    """A file's content; empty where there is none.

    Raises:
        ValueError: it is no JSON.
    """
    try:
        return json.loads(path.read_text()) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{path} cannot be read ({error}): delete it to have it made again") from error


def write_json(path: Path, facts: dict[str, Any]) -> None:
    """Beside, then renamed: a machine that dies meanwhile leaves the earlier file."""
    draft = path.with_suffix(".part")
    draft.write_text(json.dumps(facts, indent=2) + "\n")
    draft.replace(path)


def finished(folder: Path, facts: dict[str, Any]) -> bool:
    evaluated = not facts["source"] or (folder / "evaluation" / "source.json").is_file()
    ended = evaluated and read_json(folder / "cell.json").get("status") == "finished"
    return ended and not without_scores(folder, facts["anomaly"])


def without_scores(run: Path, benchmarks: Sequence[str]) -> list[str]:
    """The anomaly benchmarks that the run has no results on, or went on after them; the picture comes last."""
    return [name for name in benchmarks if outdated(run, run / "anomaly" / f"{name}.png")]


def status(folder: Path) -> str | None:
    return read_json(folder / "summary.json").get("status")


def resume(folder: Path) -> list[str]:
    """The override that continues a half-finished run.

    It starts anew without a whole checkpoint, and after a failed audit, of which the rest of a run shows too little.
    """
    last = folder / "checkpoints" / "last.ckpt"
    if zipfile.is_zipfile(last) and not (status(folder) or "").startswith("failed: LoRA audit"):
        return [f"resume='{last}'"]
    if status(folder) != "finished":
        shutil.rmtree(folder, ignore_errors=True)
    return []


def run_logged(command: Sequence[str], log: Path, environment: dict[str, str]) -> str | None:
    """Runs a command, its output both shown and appended to the log; returns its error, or None."""
    before = log.stat().st_size if log.is_file() else 0
    with (
        log.open("ab") as file,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment) as process,
    ):
        while part := process.stdout.read1():
            sys.stdout.buffer.write(part)
            sys.stdout.buffer.flush()
            file.write(part)
    if process.returncode == 0:
        return None
    if process.returncode < 0:
        return f"killed by signal {-process.returncode}; 9 often means that memory ran out"
    output = log.read_bytes()[before:].decode(errors="replace")
    lines = [line for line in output.splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]  # its sentence comes last
    return (errors or lines or [f"exit code {process.returncode}"])[-1]


@contextmanager
def one_device(matrix: Path, devices: Sequence[int]) -> Iterator[dict[str, str]]:
    """An environment that shows one of the GPUs, free until the end of the block; without `devices` all of them."""
    environment = {**os.environ, "HYDRA_FULL_ERROR": "0"}
    if not devices:
        yield environment
        return
    from filelock import FileLock, Timeout

    while True:
        for device in devices:
            try:
                with FileLock(matrix / f".device_{device}.lock", timeout=1):
                    yield {**environment, "CUDA_VISIBLE_DEVICES": str(device)}
                    return
            except Timeout:
                continue


def summarise(folder: Path, facts: dict[str, Any]) -> int:
    """Says what became of the cells, and what to do next."""
    cells = [(variant, seed) for seed in facts["seeds"] for variant in facts["variants"]]
    failed = [cell for cell in cells if not finished(folder / cell[0] / f"seed_{cell[1]}", facts)]
    for variant, seed in failed:
        cell = read_json(folder / variant / f"seed_{seed}" / "cell.json")
        error = cell.get("error") or next(iter(cell.get("anomaly_errors", {}).values()), "did not end")
        print(f"failed: {variant}, seed {seed}: {error}")
    print(f"{len(cells) - len(failed)} of {len(cells)} cells finished in {folder}")
    print(f"next: python scripts/compare.py report {folder}")
    return 1 if failed else 0


# Evaluation and report


def evaluate_run(run: Path, source: Sequence[str] = ()) -> None:
    """Scores the run's artefact on its own validation images and on the source domain: `evaluation/` in its folder.

    Raises:
        ValueError: the artefact does not score what the run reported.
    """
    import yaml

    from eomt.training.evaluation import evaluate
    from eomt.training.mask_classification_semantic import MaskClassificationSemantic

    quiet_libraries()
    summary = read_json(run / "summary.json")
    if not summary:
        raise FileNotFoundError(f"{run} has no summary.json: give the folder of a run that ended")
    module = MaskClassificationSemantic.from_pretrained(run / summary["artefact"])
    settings = yaml.safe_load((run / "config.yaml").read_text())["trainer"]
    options = {key: settings[key] for key in ("precision", "accelerator")} | {"progress": sys.stderr.isatty()}
    name, data = data_of_run(run)
    target = evaluate(module, data, description=name, **options)
    exact = not summary["machine"]["gpus"] and not module.hparams.compile  # kernels of a GPU choose their own order
    if summary["miou"] is not None and abs(target.miou - summary["miou"]) > (1e-6 if exact else 1e-3):
        raise ValueError(
            f"{run / summary['artefact']} scores {target.miou:.7f}, but its run reported {summary['miou']:.7f}: "
            "data or device have changed since, evaluate where it was trained"
        )
    target.save(run / "evaluation", "target")
    if source:
        name, data = open_data(source, module.hparams.img_size, batch_size=1)
        evaluate(module, data, description=name, **options).save(run / "evaluation", "source")


def score_anomalies(run: Path, facts: dict[str, Any], environment: dict[str, str]) -> dict[str, str]:
    """Scores the run's artefact on the benchmarks it has no results on; returns the errors of those that failed."""
    errors = {}
    for name in without_scores(run, facts["anomaly"]):
        artefact = run / read_json(run / "summary.json")["artefact"]
        command = [sys.executable, str(ROOT / "scripts" / "evaluate_anomaly.py"), str(artefact), f"data={name}"]
        command += [] if name == TOYS else [f"data.root={facts['anomaly_root']}"]
        if error := run_logged(command, run / "run.log", environment):
            errors[name] = error
        shutil.rmtree(run / "anomaly" / "logits", ignore_errors=True)  # gigabytes, of every cell
    return errors


def outdated(run: Path, scores: Path) -> bool:
    """Whether the run has no such scores, or went on after them."""
    return not scores.is_file() or scores.stat().st_mtime < (run / "summary.json").stat().st_mtime


def report_runs(args: argparse.Namespace) -> int:
    """Evaluates what has not been evaluated yet, and writes the report."""
    from eomt.comparison.page import write_report
    from eomt.comparison.runs import load_runs

    for run in load_runs(args.runs):
        matrix = {"source": [], "anomaly": []} | read_json(run.path.resolve().parents[1] / "matrix.json")
        if run.error is None and outdated(run.path, run.path / "evaluation" / "target.json"):
            print(f"evaluating {run.path}")
            evaluate_run(run.path, matrix["source"])
        untried = [name for name in matrix["anomaly"] if name not in run.anomaly_errors]
        if run.error is None and (errors := score_anomalies(run.path, matrix | {"anomaly": untried}, dict(os.environ))):
            write_json(run.path / "cell.json", run.cell | {"anomaly_errors": run.anomaly_errors | errors})
        old = [name for name in run.anomalies if outdated(run.path, run.path / "anomaly" / f"{name}.json")]
        if run.error is None and old:
            raise ValueError(
                f"{run.path}/anomaly/{old[0]}.json is older than the run's end: score again with "
                f"scripts/evaluate_anomaly.py {run.path} data={old[0]}, or delete it"
            )
    output = args.output or args.runs[0] / "report"
    write_report(load_runs(args.runs), output, args.baseline, args.allow_different, predictions, args.score)
    print(f"{output}/report.html, report.md, report.csv, report.tex")
    return 0


def predictions(run: Path, names: Sequence[str]) -> "dict[str, tuple[Tensor, Tensor, Tensor]]":
    """Image, target and what the run's artefact sees, of validation images by name."""
    import torch
    from rich.progress import track

    from eomt.training.mask_classification_semantic import MaskClassificationSemantic

    module = MaskClassificationSemantic.from_pretrained(run / read_json(run / "summary.json")["artefact"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    module.to(device)
    images = data_of_run(run)[1].val_set
    pictures = {}
    with torch.autocast(device, torch.bfloat16, enabled="bf16" in (module.trained_precision or "")):
        for name in track(names, f"pictures of {run}", transient=True):
            image, target = images[images.names.index(name)]
            pictures[name] = (image, target, module.predict(image))
    return pictures


if __name__ == "__main__":
    sys.exit(main())
