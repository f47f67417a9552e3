"""The card of a published network, `README.md`: base, data, classes, settings, score, command; torch is not needed.

Nothing of the machine that trained it is told: no path, no setting of loggers, nothing that looks like a secret.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eomt.command_line import PATH_KEYS
from eomt.flags import FLAGS, HYDRA_FLAGS, split_flag, take_values
from eomt.settings.hub import hub_place

TOLD = ("model", "data", "trainer", "callbacks", "experiment", "variant", "lora", "seed", "trunk_cache", "views")
TOLD += ("patience", "allow_any_target", "--config-name", "-cn")
OF_THE_MACHINE = (
    "logger",
    "name",
    "group",
    "job",
    "output_dir",
    "resume",
    "hydra",
)  # left out silently
SECRET = re.compile(r"token|secret|passw|credential|api_?key|auth", re.IGNORECASE)
PLACE = "PLACE"  # stands for a path
# absolute ones in any text, also of Windows
PATHS = re.compile(r"(?<![\w:/.>-])(?:~(?=/)|/[\w.@+-]+)(?:/[\w.@+-]+)*|\b[A-Za-z]:[\\/]|(?<![\w\\])\\\\\w")


@dataclass(frozen=True)
class Score:
    """What a network scores on a data set; mIoU in [0, 1], with a 95 % interval if it is known.

    Args:
        data: name of the data set.
        images: how many it has; `some`: whether only some of them were scored.
        interval: (low, high), or None.
        units: what was drawn again for the interval, as `12 images`.
        class_iou: in [0, 1] by class, None for an absent one.
    """

    data: str
    miou: float
    class_iou: Mapping[str, float | None]
    images: int | None = None
    interval: tuple[float, float] | None = None
    units: str = ""
    some: bool = False

    def __str__(self) -> str:
        some = "some of " if self.some else ""
        where = f"{self.data}, {some}{self.images} images" if self.images else self.data
        if self.interval is None:
            return f"{100 * self.miou:.2f} % mIoU on {where}"
        low, high = (100 * end for end in self.interval)
        return f"{100 * self.miou:.2f} % mIoU ({low:.2f} to {high:.2f}) on {where}"


@dataclass(frozen=True)
class Base:
    """What an adapter's base is: in words, by fingerprint, and its repository and commit on the hub, if it has one.

    `setting` names the file that others have to find by themselves, None where there is none.
    """

    words: str
    fingerprint: str | None = None
    repo: str | None = None
    revision: str | None = None
    setting: str | None = None


@dataclass(frozen=True)
class CardFacts:
    """All that a card tells; `init` are the network's settings, `summary` and `data` its run's, if known."""

    repo: str
    init: Mapping[str, Any]
    artefact_id: str | None
    base: Base
    licence: str
    version: str
    precision: str | None = None
    scores: Sequence[Score] = ()
    summary: Mapping[str, Any] = field(default_factory=dict)
    data: str | None = None
    picture: str | None = None
    extracted: bool = False

    @property
    def is_adapter(self) -> bool:
        return bool(self.init.get("use_lora"))


def cleaned_command(words: Sequence[str]) -> str:
    """A command without what is of its machine: paths become `PLACE`, and only settings of the recipe are left.

    It ends with `…` where something was left out that may be of the recipe.
    """
    if not words:
        return ""
    kept, more = [Path(words[0]).name], False
    rest = [part for word in words[1:] for part in split_flag(word)]
    while rest:
        word = rest.pop(0)
        if word in FLAGS:
            values, rest = take_values(word, rest)
            name = re.split("[= ]", FLAGS[word].override)[0]
            told = [word, *(hidden(name, value) for value in values)]
        elif word.startswith("-"):
            count = HYDRA_FLAGS.get(word, 1)
            name, told, rest = word, [word, *rest[:count]], rest[count:]
        else:
            key, equals, value = word.partition("=")
            name = key.lstrip("+~")
            told = [f"{key}{equals}{hidden(name, value)}"]
        root = re.split("[./]", name)[0]
        if SECRET.search(name) or root in OF_THE_MACHINE or (root.startswith("-") and root not in TOLD):
            continue
        kept, more = (kept + told, more) if root in TOLD else (kept, True)
    return shlex.join(kept) + (" …" if more else "")


def hidden(name: str, value: str) -> str:
    """The value of a setting, or `PLACE` for a path; a place on the hub may be told."""
    return PLACE if value and is_place(name, value) and not hub_place_or_none(value) else value


def is_place(name: str, value: str) -> bool:
    """Whether the value of a setting is or holds a path, or something of the environment."""
    return name in PATH_KEYS or any(mark in value for mark in ("/", "\\", "~", "${"))


def hub_place_or_none(value: str) -> bool:
    """Whether a value is a place on the hub, in quotes or not."""
    try:
        return hub_place(value.strip("'\"")) is not None
    except ValueError:
        return False


def metadata(facts: CardFacts) -> dict[str, Any]:
    """What the hub reads at the top of a card."""
    kind = "lora" if facts.init.get("lora_method", "lora") == "lora" else str(facts.init["lora_method"])
    found = {
        "license": facts.licence,
        "library_name": "peft" if facts.is_adapter else "pytorch",
        "pipeline_tag": "image-segmentation",
        "tags": ["eomt", "semantic-segmentation", "eomt-lora", *([kind] if facts.is_adapter else [])],
    }
    if facts.base.repo:
        relation = "adapter" if facts.is_adapter else "finetune"
        found |= {"base_model": facts.base.repo, "base_model_relation": relation}
    if facts.scores:
        results = [
            {
                "task": {"type": "image-segmentation"},
                "dataset": {"name": score.data, "type": score.data},
                "metrics": [{"type": "mean_iou", "value": round(score.miou, 6), "name": "mIoU"}],
            }
            for score in facts.scores
        ]
        found["model-index"] = [{"name": facts.repo.rpartition("/")[2], "results": results}]
    return found


def card(facts: CardFacts) -> str:
    """The text of a card, with the hub's metadata at its top."""
    import yaml

    parts = [
        f"---\n{yaml.safe_dump(metadata(facts), sort_keys=False, allow_unicode=True)}---",
        f"# {facts.repo.rpartition('/')[2]}",
        _summary(facts),
        _use(facts),
        *([f"![{facts.picture}]({facts.picture})"] if facts.picture else []),
        _table("What it is", _network(facts)),
        _table("How it was trained", _training(facts)),
        _scores(facts),
        _licence(facts),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _summary(facts: CardFacts) -> str:
    what = f"An adapter for {facts.base.words}: a" if facts.is_adapter else "A"
    best = f" It scores {facts.scores[0]}." if facts.scores else ""
    made = "trained with" if facts.summary else "saved by"  # without a run, it may have been converted or merged
    made = "not trained, but extracted from a full fine-tune by" if facts.extracted else made
    return (
        f"{what}n [EoMT](https://www.tue-mps.org/eomt/) that segments images into {facts.init['num_classes']} "
        f"classes, {made} EoMT-LoRA {facts.version}.{best}"
    )


def _use(facts: CardFacts) -> str:
    base = f', {facts.base.setting}="BASE"' if facts.is_adapter and facts.base.setting else ""
    return (
        "```python\nfrom eomt.training.mask_classification_semantic import MaskClassificationSemantic\n\n"
        f'module = MaskClassificationSemantic.from_pretrained("{facts.repo}"{base})\n'
        'classes = module.predict("street.jpg")  # uint8 [H, W], indices into module.class_names\n```'
    )


def _network(facts: CardFacts) -> dict[str, Any]:
    init = facts.init
    rows = {
        "backbone": f"`{init.get('backbone_name')}`, patches of {init.get('patch_size', 16)}",
        "base": facts.base.words if facts.is_adapter or facts.summary else None,
        "base fingerprint": facts.base.fingerprint and f"`{facts.base.fingerprint}`",
        "windows": "{} x {} pixels".format(*init["img_size"]),
        "queries": init.get("num_q"),
        "classes": ", ".join(map(str, init.get("class_names") or range(init["num_classes"]))),
        "fingerprint": facts.artefact_id and f"`{facts.artefact_id}`",
    }
    if facts.is_adapter:
        targets = ", ".join(f"`{name}`" for name in init.get("lora_target_modules") or ())
        blocks = init.get("lora_blocks", "all")
        rows |= {
            "method": init.get("lora_method", "lora"),
            "rank, alpha": f"{init.get('lora_rank')}, {init.get('lora_alpha')}",
            "targets": f"{targets} in {'all blocks' if blocks == 'all' else f'the last {blocks} blocks'}",
            "base while it trained": init.get("base_quantisation"),
        }
    return rows


def _training(facts: CardFacts) -> dict[str, Any]:
    summary = facts.summary
    data = summary.get("data") or {}
    versions = summary.get("versions") or {}
    command = cleaned_command(summary.get("command") or [])
    return {
        "data": facts.data,
        "images": data and f"{data.get('train_images')} to train, {data.get('val_images')} to validate",
        "data fingerprint": data.get("train") and f"`{data['train']}`",
        "steps": summary.get("steps"),
        "seed": summary.get("seed"),
        "precision": facts.precision,
        "trainable parameters": summary.get("trainable_parameters") and f"{summary['trainable_parameters']:,}",
        "commit": summary.get("git_commit"),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "command": command and f"`{command}`",
    }


def _table(title: str, rows: Mapping[str, Any]) -> str:
    lines = [f"| {name} | {_cell(value)} |" for name, value in rows.items() if value not in (None, "", {})]
    return "\n".join([f"## {title}", "", "| | |", "|---|---|", *lines]) if lines else ""


def _cell(value: Any) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")


def _scores(facts: CardFacts) -> str:
    if not facts.scores:
        return ""
    names = list(facts.scores[0].class_iou)
    scores = [score for score in facts.scores if list(score.class_iou) == names]
    lines = ["| IoU, % | " + " | ".join(_cell(score.data) for score in scores) + " |", "|---" * (len(scores) + 1) + "|"]
    for name in names:
        cells = (score.class_iou[name] for score in scores)
        lines.append(
            f"| {_cell(name)} | " + " | ".join("absent" if iou is None else f"{100 * iou:.2f}" for iou in cells) + " |"
        )
    notes = [
        f"* {score}"
        + (f"; the interval is of 95 %, by drawing {score.units} again" if score.interval else "; no interval is known")
        for score in facts.scores
    ]
    return "\n".join(["## Scores", "", *notes, "", *lines])


def _licence(facts: CardFacts) -> str:
    said = "has not been chosen yet" if facts.licence == "unknown" else f"is `{facts.licence}`"
    return f"## Licence\n\nThe licence of these weights {said}. Those of the base and of the data hold besides."
