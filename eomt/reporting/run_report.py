"""Prints the start and the end of a run, and writes its summary."""

import logging
import math
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from lightning import Callback, LightningDataModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from eomt.command_line import one_sentence
from eomt.cost.memory_errors import cost_of_run
from eomt.cost.training_cost import Cost
from eomt.files import Tolerated, read_json
from eomt.fingerprints import Identity, checksums, identify
from eomt.lora.quantised import count_parameters
from eomt.lora.report import trainable_report
from eomt.processes import Interrupted
from eomt.reporting.run_summary import file_sizes, peak_memory, write_summary
from eomt.training.class_scores import over
from eomt.training.mask_classification_semantic import MaskClassificationSemantic
from eomt.training.trunk_cache import TrunkCache, cached_blocks

logger = logging.getLogger(__name__)


class Start(NamedTuple):
    """The weights and the cost of a run, known before its first step."""

    weights: Identity  # fresh adapters left out
    backbone: Identity
    cost: Cost | None


def report_start(trainer: Trainer, module: MaskClassificationSemantic, datamodule: LightningDataModule) -> Start:
    """Logs the parameters that will train, the data and the cost, and records the weights.

    Raises:
        ValueError: a `TrunkCache` that cannot be; see `cached_blocks`.
    """
    print_start(module, datamodule, trains=trainer.max_steps != 0)
    cost = estimate_cost(trainer, module, datamodule.batch_size)
    return Start(identify(module.network, module.network.drawn), module.base or identify(module.backbone), cost)


def print_start(module: MaskClassificationSemantic, datamodule: LightningDataModule, trains: bool = True) -> None:
    """Logs what will train, and on what; once, whatever the number of processes."""
    if rank_zero_only.rank:
        return
    logger.info("%s", trainable_report(module) if trains else "nothing trains: the start network is evaluated")


def estimate_cost(trainer: Trainer, module: MaskClassificationSemantic, batch_size: int) -> Cost | None:
    """Logs what training will take on each device, and returns it; None, with a warning, where it cannot be told.

    Raises:
        ValueError: a `TrunkCache` that cannot be; see `cached_blocks`.
    """
    if rank_zero_only.rank or trainer.max_steps == 0:
        return None
    if any(isinstance(callback, TrunkCache) for callback in trainer.callbacks):
        cached_blocks(module)
    try:
        cost = cost_of_run(trainer, module, batch_size)
    except Exception as error:  # whatever it is, the run itself may well be right
        logger.warning("the cost of training cannot be estimated: %s: %s", type(error).__name__, error)
        return None
    logger.info(
        "estimated: %.2f GiB at the peak (weights %.2f, gradients and optimizer %.2f, activations %.2f), "
        "%.3g TFLOP a step",
        *(size / 2**30 for size in (cost.peak, cost.weights, cost.gradients + cost.optimizer, cost.activations)),
        cost.flops / 1e12,
    )
    return cost


def validate_last_step(trainer: Trainer, module: MaskClassificationSemantic, datamodule: LightningDataModule) -> None:
    """A run ends with a validation of the weights that it ends with.

    They may be others than the last that were validated: its length is no multiple of the interval, or a callback put
    an average in their place at the end.
    """
    if trainer.global_step > module.total_steps > 0:
        logger.warning(
            "the checkpoint has %d steps behind it, more than the %d of this run: nothing was trained",
            trainer.global_step,
            module.total_steps,
        )
    scored = module.validated_step == trainer.global_step and module.scored == checksums(module)
    if not scored and trainer.limit_val_batches != 0:
        trainer.validate(module, datamodule, verbose=False)


def finish_run(
    trainer: Trainer,
    module: MaskClassificationSemantic,
    datamodule: LightningDataModule,
    callbacks: Mapping[str, Callback],
    seed: int,
    start: Start,
) -> dict[str, Any]:
    """Writes `summary.json` to the trainer's folder and prints the result; returns the summary."""
    output_dir, error = Path(trainer.default_root_dir), sys.exc_info()[1]
    save_best = callbacks["save_best"]
    best = save_best.best
    audit = callbacks["audit"].audit
    last = trainer.callback_metrics.get("val/miou")
    folder = save_best.folder(module)
    saved = [folder] if save_best.artefact_id else []  # of this run
    batches = callbacks["batches"].identity if "batches" in callbacks else None
    facts = {
        "status": status_of(error),
        "miou": best["miou"] if math.isfinite(best["miou"]) else None,
        "class_iou": {name: None if iou != iou else iou for name, iou in best.get("class_iou", {}).items()},
        "miou_classes": sum(iou == iou for iou in best["class_iou"].values()) if "class_iou" in best else None,
        "class_pixels": module.class_pixels if "class_iou" in best else {},  # every validation is on the same labels
        "best_step": best.get("step"),
        "kept": save_best.keep,
        "last_miou": None if last is None else last.item(),
        "steps": trainer.global_step,
        "planned_steps": module.total_steps,
        "skipped_steps": callbacks["finite_steps"].skipped,
        "overflows": callbacks["finite_steps"].overflows,
        "trainable_parameters": sum(p.numel() for p in module.parameters() if p.requires_grad and trainer.max_steps),
        "total_parameters": count_parameters(module),
        "artefact": folder.name,
        "artefact_id": save_best.artefact_id,
        "files": sizes_of(*saved, output_dir / "checkpoints"),
        "peak_memory": peak_memory(callbacks["clock"].memory_before),
        "estimated_memory": memory_of(start.cost) if start.cost else None,
        "seconds_per_step": callbacks["clock"].summary(),
        "flops_per_step": callbacks["flops"].flops if "flops" in callbacks else None,
        "wall_seconds": callbacks["clock"].elapsed(),
        "parts": callbacks["clock"].parts,
        "data": data_facts(datamodule, error) if trainer.is_global_zero else None,
        "batches": batches and batches.exact,
        "batch_contents": batches and batches.as_dict(),
        "start_fingerprint": start.weights.exact,
        "start_weights": start.weights.as_dict(),
        "start_backbone": start.backbone.stored,
        "seed": seed,
        "lora_audit": audit.results if audit else None,
    }
    if not trainer.is_global_zero:
        return facts
    earlier = read_json(output_dir / "summary.json", {})
    if error and earlier.get("status") == "finished" and trainer.global_step <= earlier.get("steps", 0):
        return earlier  # going on did not come to a step
    summary = write_summary(output_dir / "summary.json", facts)
    if error is None:
        with suppress(SystemExit), Tolerated("the result on the screen"):  # rich exits where nobody reads
            print_result(summary, output_dir)
    return summary


def data_facts(datamodule: LightningDataModule, error: BaseException | None) -> dict[str, Any]:
    """Fingerprints of the data; of a run that did not end well only those that are known without reading all of it."""
    try:
        return datamodule.fingerprint(hashing=error is None)
    except (
        Interrupted,
        KeyboardInterrupt,
        OSError,
        ValueError,
    ) as problem:  # the summary of a trained run is not lost for this
        logger.warning("the data's fingerprint is not known: %s: %s", type(problem).__name__, problem)
        return {"train_images": len(datamodule.train_set), "val_images": len(datamodule.val_set)}


def sizes_of(*folders: Path) -> dict[str, int]:
    """Bytes of every file in folders, by `FOLDER/NAME`."""
    return {f"{folder.name}/{name}": size for folder in folders for name, size in file_sizes(folder).items()}


def memory_of(cost: Cost) -> dict[str, int]:
    """Estimated bytes: the most at once, and what they are."""
    parts = ("weights", "gradients", "optimizer", "activations")
    return {"bytes": cost.peak} | {part: getattr(cost, part) for part in parts}


def status_of(error: BaseException | None) -> str:
    if error is None:
        return "finished"
    if isinstance(error, (Interrupted, KeyboardInterrupt, SystemExit)):  # Lightning turns Ctrl-C into the last
        return "interrupted"
    return f"failed: {one_sentence(error)}"


def print_result(summary: Mapping[str, Any], output_dir: Path) -> None:
    """IoU of each class, and what the run cost."""
    console = Console()
    if summary["class_iou"]:
        table = Table("class", "IoU")
        for name, iou in summary["class_iou"].items():
            table.add_row(escape(name), "absent" if iou is None else f"{100 * iou:.2f}")
        console.print(table)
        score = f"mIoU {100 * summary['miou']:.2f}{over(summary['class_iou'])}"
        print(f"{score}, the {summary['kept']} validation, at step {summary['best_step']}")
    if summary["skipped_steps"]:
        print(
            f"{summary['skipped_steps']} of {summary['steps']} steps were skipped, their loss or gradients were not "
            f"finite: {output_dir / 'failures'} has their images"
        )
    if summary["overflows"]:
        print(f"{summary['overflows']} of {summary['steps']} steps overflowed in 16 bits and were left out")
    artefact = summary["artefact"] + "/"
    size = sum(n for name, n in summary["files"].items() if name.startswith(artefact))
    print(f"{summary['trainable_parameters']:,} of {summary['total_parameters']:,} parameters trained")
    step, memory = summary["seconds_per_step"], summary["peak_memory"]
    if summary["steps"]:
        print(f"{step['total']:.3f} s per step, {step['data']:.3f} s of it waiting for data")
    print(f"peak memory {memory['bytes'] / 2**30:.2f} GiB ({memory['of']}){beside_estimate(summary)}")
    print(f"{output_dir / artefact} {size / 2**20:.2f} MiB")


def beside_estimate(summary: Mapping[str, Any]) -> str:
    """Words the estimated peak: on a GPU all of it, of a process what training adds to weights and libraries."""
    memory, estimate = summary["peak_memory"], summary["estimated_memory"]
    if estimate is None:
        return ""
    if "before_training" not in memory:
        return f", estimated {estimate['bytes'] / 2**30:.2f} GiB"
    added, expected = memory["bytes"] - memory["before_training"], estimate["bytes"] - estimate["weights"]
    return f", {added / 2**30:.2f} GiB of it added by training, estimated {expected / 2**30:.2f} GiB"
