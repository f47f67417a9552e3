"""Makes an adapter out of a full fine-tune, and tells what each rank keeps of the weights' change and of the mIoU.

It answers whether LoRA could have held what the fine-tune learned. Whether training would have found it is another
question: an update found by SVD is the best of its rank for the weights, not for the loss.
"""

import logging
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eomt.command_line import quiet_libraries
from eomt.files import check_place, replacing, replacing_folder, write_json
from eomt.inference.saved import EXTRACTION_FILE, check_artefact, find_weights, read_config, run_of
from eomt.settings.backbone_choice import plain_backbone
from eomt.settings.compose import check_data_for, data_for
from eomt.settings.hub import hub_place, local_path

if TYPE_CHECKING:  # mistakes are told before torch is there
    from torch import nn

    from eomt.lora.extraction import Change
    from eomt.training.mask_classification_semantic import MaskClassificationSemantic

log = logging.getLogger(__name__)

RANKS = (1, 2, 4, 8, 16, 32, 64)
PLOT = "extraction.png"
LARGE = 0.5  # a change relative to the weights that no fine-tune makes
TIMM = "timm"  # in the place of a base: the pretrained weights of timm


def extract(
    full: Path,
    base: str,
    out: Path,
    rank: int,
    targets: Sequence[str] = (),
    ranks: Sequence[int] = RANKS,
    overrides: Sequence[str] = (),
    scores: bool = True,
) -> dict[str, Any]:
    """Writes an adapter folder with the facts and a plot in it; returns the facts.

    Args:
        full: a model/ folder, a run's folder or its checkpoint.
        base: what `full` was trained from: an EoMT, a plain backbone, or `timm` for timm's pretrained weights.
        out: the folder to write; nothing may be in it.
        rank: of the adapter.
        targets: endings of the layers to adapt; none: every linear layer of the blocks.
        ranks: of which the share kept and the mIoU are told.
        overrides: `data=NAME data.key=value`; none: the data of the run.
        scores: whether to evaluate; False: no data are needed.

    Raises:
        ValueError, OSError: the networks or the data are not what they should be, or `out` is taken.
    """
    full = check_request(full, base, out, (rank, *ranks))
    if scores:
        check_data_for(run_of(full), overrides)

    from eomt.lora.extraction import changes, left_out
    from eomt.training.mask_classification_semantic import MaskClassificationSemantic
    from lora_config import LoRASettings, find_targets

    quiet_libraries()
    whole = MaskClassificationSemantic.from_pretrained(full).float()
    if whole.lora is not None:
        raise ValueError(f"{full} is an adapter already: give the model/ folder of a full fine-tune")
    places = place_of(base)
    start = MaskClassificationSemantic(**settings_on(whole, places))
    endings = list(targets or linear_layers(start.backbone))
    names = find_targets(start.backbone, LoRASettings(target_modules=endings))
    check_rank(rank, start.backbone, names)
    found = changes(start.backbone, whole.backbone, names)
    if not any(change.norm for change in found.values()):
        raise ValueError(f"{full} has the very weights of {base} in all {len(found)} layers: no change to extract")
    ranks = sorted(set(ranks))
    rest = left_out(start.backbone.state_dict(), whole.backbone.state_dict(), names)
    facts = describe(found, rest, ranks) | {"full": str(full), "base": str(base), "rank": rank}
    warn_of_another_base(facts, base)
    facts["miou"] = dict(score_ranks(whole, start, found, ranks, run_of(full), overrides)) if scores else {}
    lora = {"lora_rank": rank, "lora_alpha": rank, "lora_target_modules": endings}
    adapter = build_adapter(whole, settings_on(whole, places) | lora, found)
    with replacing_folder(out) as draft:
        adapter.save_pretrained(draft)
        write_json(draft / EXTRACTION_FILE, facts)
        plot(facts, draft / PLOT)
    return facts


def check_request(full: Path, base: str, out: Path, ranks: Sequence[int]) -> Path:
    """Returns the folder or checkpoint of the full fine-tune, after what can be known without torch.

    Raises:
        ValueError, OSError: see `extract`.
    """
    if wrong := [rank for rank in ranks if rank < 1]:
        raise ValueError(f"rank {wrong[0]}: at least 1")
    check_place(out, empty=True)
    full = check_artefact(full)
    if full.is_dir() and read_config(full)["init"].get("use_lora"):
        raise ValueError(f"{full} is an adapter already: give the model/ folder of a full fine-tune")
    if base != TIMM and not local_path(base).exists():
        raise FileNotFoundError(f"{base}: no such file or folder; {TIMM} means timm's pretrained weights")
    return full


def check_rank(rank: int, backbone: "nn.Module", names: Sequence[str]) -> None:
    """Raises ValueError where no layer has a change of this rank: the adapter would be larger and hold no more."""
    largest = max(min(backbone.get_submodule(name).weight.shape) for name in names)
    if rank > largest:
        raise ValueError(f"--rank {rank}: no layer's change has more than rank {largest} here, which holds all of it")


def place_of(base: str) -> dict[str, Any]:
    """The settings that name a base."""
    if base == TIMM:
        return {"ckpt_path": None, "backbone_weights": None, "pretrained": True}
    kind = "backbone_weights" if plain_backbone(base) else "ckpt_path"
    path = base if hub_place(base) else str((find_weights(base) if kind == "ckpt_path" else Path(base)).resolve())
    return {"ckpt_path": None, "backbone_weights": None, kind: path}


def settings_on(whole: "MaskClassificationSemantic", places: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a plain network like this one, with the weights of the base."""
    from eomt.inference.artefacts import ALL_TRAINABLE

    fresh_heads = {"load_ckpt_class_head": False, "delta_weights": None, "use_lora": False}
    return {**whole.hparams, **ALL_TRAINABLE, **fresh_heads, **places}


def linear_layers(backbone: Any) -> list[str]:
    """The endings of the names of all linear layers in a backbone's blocks, as `attn.qkv`."""
    from torch import nn

    names = (name for name, part in backbone.named_modules() if isinstance(part, nn.Linear))
    return sorted({found[1] for name in names if (found := re.search(r"\.\d+\.(.+)$", name))})


def build_adapter(
    whole: "MaskClassificationSemantic", settings: Mapping[str, Any], found: "Mapping[str, Change]"
) -> "MaskClassificationSemantic":
    """The base with adapters that hold the changes, and the heads of the full fine-tune."""
    from eomt.inference.artefacts import BACKBONE
    from eomt.lora.extraction import set_updates
    from eomt.training.mask_classification_semantic import MaskClassificationSemantic

    lora = {"use_lora": True, "lora_method": "lora", "lora_dropout": 0.0, "lora_blocks": "all", "lora_options": None}
    module = MaskClassificationSemantic(**{**settings, **lora})
    set_updates(module.backbone, found)
    heads = {key: value for key, value in whole.state_dict().items() if not key.startswith(BACKBONE)}
    module.load_state_dict(heads, strict=False)
    module.trained_precision = whole.trained_precision
    return module.eval()


def describe(
    found: "Mapping[str, Change]", rest: Mapping[str, Mapping[str, float]], ranks: Sequence[int]
) -> dict[str, Any]:
    """What the ranks keep, by layer and together, and what no rank does, by kind of tensor."""
    layers = {
        name: {
            "norm": change.norm,
            "relative": change.norm / max(change.base, 1e-30),
            "kept": {str(rank): change.kept(rank) for rank in ranks},
            "rank_for_90_percent": change.rank_for(0.9),
        }
        for name, change in found.items()
    }
    squares = {name: layer["norm"] ** 2 for name, layer in layers.items()}
    total, beside = sum(squares.values()), sum(tensor["norm"] ** 2 for tensor in rest.values())
    kinds: dict[str, dict[str, float]] = {}
    for name, tensor in rest.items():
        kind = kinds.setdefault(
            re.sub(r"(?<![^.])\d+(?![^.])", "#", name), {"tensors": 0, "norm": 0.0, "relative": 0.0}
        )
        kind["tensors"] += 1
        kind["norm"] = (kind["norm"] ** 2 + tensor["norm"] ** 2) ** 0.5
        kind["relative"] = max(kind["relative"], tensor["relative"])
    return {
        "layers": layers,
        "kept": {
            str(rank): sum(squares[name] * change.kept(rank) for name, change in found.items()) / total
            if total
            else 1.0
            for rank in ranks
        },
        "left_out": kinds,
        "left_out_share": beside / (total + beside) if total + beside else 0.0,
    }


def warn_of_another_base(facts: Mapping[str, Any], base: str) -> None:
    """Warns where the weights changed so much that the base is probably not what the training began with."""
    largest = max(facts["layers"].items(), key=lambda item: item[1]["relative"], default=None)
    if largest and largest[1]["relative"] > LARGE:
        log.warning(
            "%s changed by %.0f %% of its weights: look whether the network was trained from %s",
            *(largest[0], 100 * largest[1]["relative"], base),
        )


def score_ranks(
    whole: "MaskClassificationSemantic",
    start: "MaskClassificationSemantic",
    found: "Mapping[str, Change]",
    ranks: Sequence[int],
    run: Path,
    overrides: Sequence[str],
) -> Iterator[tuple[str, float]]:
    """mIoU with the heads of the full fine-tune and each rank's updates; 0: of none, `targets`: of the whole change."""
    import torch

    from eomt.inference.artefacts import BACKBONE
    from eomt.training.evaluation import evaluate

    _, data = data_for(run, overrides, whole.hparams.img_size)
    options = {"precision": whole.trained_precision or "32-true", "progress": sys.stderr.isatty()}
    start.load_state_dict({k: v for k, v in whole.state_dict().items() if not k.startswith(BACKBONE)}, strict=False)
    start.eval()
    before = {name: start.backbone.get_submodule(name).weight.detach().clone() for name in found}
    for rank in (0, *ranks, None):
        with torch.no_grad():
            for name, change in found.items():
                weight = start.backbone.get_submodule(name).weight
                weight.copy_(before[name].double() + change.update(len(change.values) if rank is None else rank))
        yield "targets" if rank is None else str(rank), evaluate(start, data, **options).miou
    yield "full", evaluate(whole, data, **options).miou


def plot(facts: Mapping[str, Any], path: Path) -> None:
    """Writes a PNG: for each kind of layer the share that every rank keeps, by block, and the mIoU by rank."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from eomt.diagnosis.inspection_report import by_target

    groups, ranks = by_target(facts["layers"]), list(facts["kept"])
    miou = facts["miou"]
    panels = len(groups) + bool(miou)
    figure, axes = plt.subplots(1, panels, figsize=(3.2 * panels, 3.4), squeeze=False, layout="constrained")
    colors = plt.get_cmap("viridis")([k / max(1, len(ranks) - 1) for k in range(len(ranks))])
    for axis, (target, blocks) in zip(axes[0], groups.items(), strict=False):
        for rank, color in zip(ranks, colors, strict=True):
            axis.plot(list(blocks), [100 * layer["kept"][rank] for layer in blocks.values()], "o-", ms=3, color=color)
        axis.set(title=target, xlabel="block", ylim=(0, 103))
    axes[0, 0].set_ylabel("kept of the change, %")
    if miou:
        tried = [name for name in miou if name.isdigit()]
        axes[0, -1].plot(range(len(tried)), [100 * miou[name] for name in tried], "o-")
        axes[0, -1].set_xticks(range(len(tried)), tried)
        for name, style in (("targets", ":"), ("full", "--")):
            axes[0, -1].axhline(100 * miou[name], linestyle=style, color="gray", label=name)
        axes[0, -1].set(title="mIoU, %", xlabel="rank")
        axes[0, -1].legend(frameon=False)
    lines = [plt.Line2D([], [], color=color, label=f"rank {rank}") for rank, color in zip(ranks, colors, strict=True)]
    figure.legend(handles=lines, loc="outside lower center", ncols=min(len(lines), 7), frameon=False)
    with replacing(path) as draft:
        figure.savefig(draft, dpi=120)
    plt.close(figure)


def print_facts(facts: Mapping[str, Any]) -> None:
    """Prints a line for each rank, and what no rank of the targets holds."""
    from rich.console import Console
    from rich.table import Table

    miou = facts["miou"]
    table = Table("rank", "% of the squared change", *(["mIoU, %"] if miou else []), box=None, header_style="cyan")
    shares = {"0": 0.0, **facts["kept"], "targets": 1.0} if miou else facts["kept"]
    for name, share in shares.items():
        table.add_row(name, f"{100 * share:.1f}", *([f"{100 * miou[name]:.2f}"] if miou else []))
    if miou:
        table.add_row("full", "", f"{100 * miou['full']:.2f}")
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    print(
        f"The adapter leaves out {100 * facts['left_out_share']:.1f} % of the backbone's squared change, in "
        f"{sum(int(kind['tensors']) for kind in facts['left_out'].values())} tensors that are not its targets' weights:"
    )
    for name, kind in list(facts["left_out"].items())[:8]:
        count, percent = int(kind["tensors"]), 100 * kind["relative"]
        change = f"{percent:,.0f}" if percent >= 10 else f"{percent:.2g}"
        print(f"  {name}: {count} tensor{'s' if count > 1 else ''}, changed by up to {change} %")
