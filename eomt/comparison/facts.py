"""What was compared, in words: the settings, data, weights and machines of the runs."""

import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from eomt.command_line import plain_word
from eomt.comparison.differences import by_value, machine_name, run_names, short_hash, versions_name
from eomt.comparison.runs import Run, matrix_of
from eomt.comparison.statistics import Comparison
from eomt.comparison.table import NONE
from eomt.comparison.tuning import grids
from eomt.data.identity import same_files
from eomt.settings.formats import MATRIX, read_format


def shared_facts(comparison: Comparison) -> list[tuple[str, list[tuple[str, str]]]]:
    """Lists the facts of the runs: each with its values, and with the runs of each where there are several."""
    scored = [run for run in comparison.runs if run.error is None]
    anomalies = [("Class head", class_head), ("Outlier loss", outlier_loss), ("Pasted objects", pasted_objects)]
    asked: list[tuple[str, Callable[[Run], str]]] = [
        ("Experiment", experiment),
        ("Backbone", backbone),
        ("Weights at the start", weights),
        ("What trains", what_trains),
        ("Data", data_path),
        ("Evaluated", lambda run: f"{run.target.description or NONE} ({len(run.target.images) or '?'} images)"),
        ("Evaluated at", lambda run: f"{'x'.join(map(str, run.target.img_size))}, {run.target.precision}"),
        ("Evaluated network", kept_network),
        ("Steps", lambda run: NONE if run.steps is None else f"{run.steps:,}"),
        ("Images per step", lambda run: run.images_per_step),
        ("Learning rates", learning_rates),
        *(anomalies if comparison.benchmarks else ()),
        ("Date", lambda run: (run.summary.get("finished_at") or NONE)[:10]),
        ("Machine", lambda run: machine_name(run.summary.get("machine"))),
        ("Libraries", lambda run: versions_name(run.summary.get("versions"))),
        ("Commit", lambda run: run.summary.get("git_commit") or NONE),
        ("Training data", lambda run: _data(run, "train")),
        ("Validation data", lambda run: _data(run, "val")),
        ("Evaluated data", lambda run: short_hash(run.target.data) or NONE),
        ("Start weights", lambda run: short_hash(run.summary.get("start_fingerprint")) or NONE),
        ("First batches", lambda run: short_hash(run.summary.get("batches")) or NONE),
    ]
    facts = []
    for label, value in asked:
        values = by_value(scored, value)
        facts.append((label, [(v, run_names(runs) if len(values) > 1 else "") for v, runs in values.items()]))
    return facts


def fact_lines(comparison: Comparison) -> list[str]:
    """The facts as lines of text: `Backbone: vit_small`, and whose value it is where there are several."""
    return [
        f"{label}: " + "; ".join(f"{value} ({runs})" if runs else value for value, runs in values)
        for label, values in shared_facts(comparison)
    ]


def command(run: Run) -> str:
    """The command line of a run; empty where nothing tells it."""
    return shlex.join(run.cell.get("command") or run.summary.get("command") or [])


def provenance(runs: Sequence[Run]) -> dict[str, Any]:
    """Returns what the runs come from: one value where they agree, otherwise a list of all.

    A matrix is told by the commands that run it, as far as its file tells; `reporting.run_summary.provenance` has the
    same entries.
    """
    scored = [run for run in runs if run.error is None]
    folders = [matrix_of(run.path) for run in scored]
    commands = [
        told
        for folder, run in zip(folders, scored, strict=True)
        for told in (matrix_commands(read_format(folder / "matrix.json", MATRIX)) if folder else [command(run)])
    ]
    return {
        "commands": list(dict.fromkeys(commands)),
        **{name: shared(scored, name) for name in ("git_commit", "machine", "versions")},
        "seeds": sorted({run.seed for run in scored if run.seed is not None}),
        **{name: shared(scored, name) for name in ("steps", "data")},
    }


def shared(runs: Sequence[Run], name: str) -> Any:
    """Returns an entry of the runs' summaries, or a list where they differ; those of 0 steps have no other steps."""
    values = [run.summary.get(name) for run in runs if name != "steps" or run.steps]
    different = [value for k, value in enumerate(values) if value not in values[:k]]
    return different[0] if len(different) == 1 else different


def matrix_commands(matrix: Mapping[str, Any]) -> list[str]:
    """The command lines of a matrix, from what `matrix.json` holds: one for the variants that tried the same values."""
    tried = grids(matrix)
    together: list[list[str]] = []
    for variant in matrix["variants"]:
        alike = next((group for group in together if tried.get(group[0]) == tried.get(variant)), None)
        if alike is None:
            together.append(alike := [])
        alike.append(variant)
    return [_matrix_command({**matrix, "variants": group, "tune": tried.get(group[0], {})}) for group in together]


def _matrix_command(matrix: Mapping[str, Any]) -> str:
    def listed(values: Iterable[Any]) -> str:
        return f"[{','.join(map(str, values))}]"

    words = ["python", "scripts/compare.py", "run"]
    named = matrix.get("config_name", "cityscapes")  # which is the default
    words += ["--config-name", named] if named != "cityscapes" else []
    words += map(plain_word, matrix.get("overrides", []))
    lists = ("variants", "seeds", "images", "anomaly")
    words += [f"{key}={listed(matrix[key])}" for key in lists if matrix.get(key) and matrix[key] != ["all"]]
    words += [f"anomaly_root={matrix['anomaly_root']}"] if matrix.get("anomaly_root") else []
    if matrix["tune"]:
        words.append("tune=" + " ".join(f"{key}={listed(values)}" for key, values in matrix["tune"].items()))
    if matrix.get("source"):
        words.append("source=" + shlex.join(map(plain_word, matrix["source"])))
    return shlex.join(words)


def experiment(run: Run) -> str:
    """The experiment that its command names, or else the run's own name."""
    words = run.cell.get("command") or run.summary.get("command") or []
    named = [word.removeprefix("experiment=") for word in words if word.startswith("experiment=")]
    return named[-1] if named else run.config.get("name") or NONE


def backbone(run: Run) -> str:
    """Its name in timm, and what differs from that."""
    model = run.config.get("model") or {}
    changes = [f"{name} {value}" for name, value in (model.get("backbone_kwargs") or {}).items()]
    return (model.get("backbone_name") or NONE) + (f" with {', '.join(changes)}" if changes else "")


def weights(run: Run) -> str:
    """The files or the source of the weights before the first step; what no file holds is random."""
    model = run.config.get("model") or {}
    known = short_hash(run.summary.get("start_backbone"))
    backbone = f"backbone (SHA-256 {known})" if known else "backbone"
    if model.get("ckpt_path"):
        fresh = ", with a fresh class head" * (model.get("load_ckpt_class_head") is False)
        return f"{model['ckpt_path']}{fresh}" + f", {backbone}" * bool(known)
    if model.get("backbone_weights"):
        return f"{backbone} from {model['backbone_weights']}; queries and heads random"
    if model.get("pretrained"):
        return f"{backbone} as timm has it for {model.get('backbone_name')}; queries and heads random"
    return "random" if "pretrained" in model else NONE


def what_trains(run: Run) -> str:
    """Rank, alpha, targets and blocks of LoRA, or the parts that are not frozen."""
    model = run.config.get("model") or {}
    if run.steps == 0:
        return "nothing"
    if run.uses_lora:
        return lora_words(model)
    if model.get("unfreeze_last_n"):
        return f"the last {model['unfreeze_last_n']} blocks, queries and heads"
    frozen = model.get("freeze") or []
    return f"everything but {', '.join(frozen)}" if frozen else "everything"


def lora_words(model: dict[str, Any]) -> str:
    """`LoRA of rank 16, alpha 32, dropout 0.05, in attn.qkv, attn.proj of all blocks; queries and heads`"""
    method, targets, blocks = (model.get(f"lora_{key}") for key in ("method", "target_modules", "blocks"))
    words = [f"LoRA{f' ({method})' * (method not in (None, 'lora'))} of rank {model.get('lora_rank')}"]
    words += [f"{key} {model[f'lora_{key}']}" for key in ("alpha", "dropout") if model.get(f"lora_{key}")]
    words += [f"{name} {value}" for name, value in (model.get("lora_options") or {}).items()]
    if targets:
        where = "all blocks" if blocks in (None, "all") else f"the last {blocks} blocks"
        words.append(f"in {targets if isinstance(targets, str) else ', '.join(targets)} of {where}")
    frozen = model.get("freeze") or []
    return ", ".join(words) + (f"; {', '.join(frozen)} frozen" if frozen else "; queries and heads")


def data_path(run: Run) -> str:
    """The data set and its folder, or those of its images and masks."""
    data = run.config.get("data") or {}
    name = (data.get("_target_") or "").rpartition(".")[2] or NONE
    places = [data.get("root") or data.get("images")]
    places += [f"masks in {data['masks']}"] if places[0] and data.get("masks") else []
    return f"{name} in {', '.join(places)}" if places[0] else name


def learning_rates(run: Run) -> str:
    """Words the learning rates, which a reader asks for first when one method loses."""
    model, trainer = run.config.get("model") or {}, run.config.get("trainer") or {}
    if not run.steps or "lr" not in model:
        return NONE
    adapters = f", adapters {model.get('lora_lr') or model['lr']:g}" if run.uses_lora else ""
    frozen = run.uses_lora or "backbone" in (model.get("freeze") or [])
    layers = "" if frozen or model.get("llrd", 1) == 1 else f", layer-wise decay {model['llrd']:g}"
    decay, clip = model.get("weight_decay"), trainer.get("gradient_clip_val")
    rates = f"{model['lr']:g}{layers}{adapters}"
    return f"{rates}, {model.get('lr_schedule')}, weight decay {decay}, gradients clipped at {clip}"


def class_head(run: Run) -> str:
    """Its kind; of a cosine, scale and margin."""
    model = run.config.get("model") or {}
    angles = f", scale {model.get('arcface_scale')}, margin {model.get('arcface_margin')}"
    return run.class_head + angles * (run.class_head == "arcface")


def outlier_loss(run: Run) -> str:
    """Words the loss that teaches a network to reject outliers, with its settings."""
    model = run.config.get("model") or {}
    if not run.steps or not model.get("outlier_loss"):
        return "none"
    settings = ("outlier_weight", "inlier_margin", "outlier_margin")
    return ", ".join([model["outlier_loss"], *(f"{name.replace('_', ' ')} {model.get(name)}" for name in settings)])


def pasted_objects(run: Run) -> str:
    """Words the objects that are pasted on training scenes."""
    return (run.summary.get("data") or {}).get("cut_paste") or ("none" if run.pasted is None else str(run.pasted))


def _data(run: Run, split: str) -> str:
    data = run.summary.get("data") or {}
    return f"{short_hash(data.get(split)) or NONE} ({data.get(f'{split}_images', '?')} images)"


def kept_network(run: Run) -> str:
    """Words which network of a run was evaluated: choosing it by the evaluated images flatters every variant."""
    if run.steps == 0:
        return "as it was before training"
    if run.kept == "last":
        return "after the last step, not chosen by validation"
    same = same_files(run.target.data, (run.summary.get("data") or {}).get("val"))
    images = {True: "the evaluated images", False: "other images", None: "images that may be the evaluated ones"}[same]
    return f"best of {len(run.curve) or '?'} validations on {images}"


def audit_words(run: Run) -> str:
    """`10 of 10 passed`, with the names of those that did not."""
    audit = run.summary.get("lora_audit")
    if not audit:
        return NONE
    broken = [name for name, result in audit.items() if not result["passed"]]
    return f"{len(audit) - len(broken)} of {len(audit)} passed" + (f"; not {', '.join(broken)}" if broken else "")
