"""A saved network made ready for the Hugging Face hub, and sent there with the user's own login."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from eomt.command_line import one_sentence
from eomt.exchange.model_card import PATHS, Base, CardFacts, Score, card
from eomt.files import PICTURES, read_json, read_yaml, write_json, write_text
from eomt.inference.bases import PLACES, recorded_base
from eomt.inference.saved import (
    BASE_FILE,
    CONFIG_FILE,
    EXTRACTION_FILE,
    HEADS_FILE,
    WEIGHTS_FILE,
    check_settings,
    check_shipped,
    is_shipped,
    read_config,
    run_of,
)
from eomt.lora.saved_config import CONFIG_FILE as PEFT_FILE
from eomt.lora.saved_config import WEIGHTS_FILE as ADAPTER_FILE
from eomt.settings.formats import SUMMARY, read_format
from eomt.settings.hub import NAME, hub_place

CARD, PICTURE = "README.md", "classes.png"
TENSORS = (ADAPTER_FILE, HEADS_FILE, BASE_FILE, WEIGHTS_FILE)
FILES = (*TENSORS, CONFIG_FILE, PEFT_FILE, CARD, PICTURE)  # all that is ever sent


def check_repo(repo: str) -> None:
    """Raises ValueError for what is no name of a repository."""
    if not re.fullmatch(NAME, repo):
        raise ValueError(f"{repo} is no name of a repository: user/name is meant")


def check_picture(picture: Path | None) -> None:
    """Raises FileNotFoundError or ValueError for what is no picture."""
    if picture and not picture.is_file():
        raise FileNotFoundError(f"--picture {picture}: no such file")
    if picture and picture.suffix.lower() not in PICTURES:
        raise ValueError(f"--picture {picture}: its ending is one of {', '.join(PICTURES)}")


def stage(
    artefact: Path,
    draft: Path,
    repo: str,
    scores: Sequence[Score] = (),
    base: str | None = None,
    licence: str = "unknown",
    picture: Path | None = None,
) -> CardFacts:
    """Writes what is to be published into an empty folder; returns what its card tells.

    Args:
        artefact: an adapter/ or model/ folder.
        draft: the folder to fill.
        repo: `user/name`.
        scores: of this network.
        base: where others find an adapter's base, `hf://user/name@revision/file`; None: where it was, without the path.
        licence: the hub's name of one.
        picture: in the place of a chart of the scores; it is written anew, without what cameras note in it.

    Raises:
        ValueError: the folder is not what was saved, or a path of this machine would be told.
    """
    from eomt.inference.artefacts import check_unchanged

    check_repo(repo)
    config = read_config(artefact)
    check_settings(config, artefact / CONFIG_FILE)
    artefact_id = check_unchanged(artefact, config)
    if base and not config["init"].get("use_lora"):
        raise ValueError(f"--base {base} is for adapters, and {artefact} holds a whole network: leave it out")
    told = copy_files(artefact, draft, config, base)
    run = run_of(artefact)
    if picture or scores:
        write_picture(picture, scores, draft / PICTURE)
    check_shipped(artefact)
    shipped = is_shipped(artefact, run)
    facts = CardFacts(
        repo=repo,
        init=config["init"],
        artefact_id=artefact_id,
        base=told,
        licence=licence,
        version=str(config.get("eomt_lora", "of an early version")),
        precision=config.get("precision"),
        scores=scores,
        summary=read_format(run / "summary.json", SUMMARY, {}) if shipped else {},
        data=data_name(run) if shipped else None,
        picture=PICTURE if picture or scores else None,
        extracted=(artefact / EXTRACTION_FILE).is_file(),
    )
    write_text(draft / CARD, card(facts))
    refuse_paths(draft)
    return facts


def copy_files(artefact: Path, draft: Path, config: dict[str, Any], base: str | None) -> Base:
    """Copies a saved network but for the paths in its settings, also in `config`; returns its base."""
    for name in TENSORS:
        if (artefact / name).is_file():
            shutil.copyfile(artefact / name, draft / name)
    config["init"] = without_paths(config["init"], base)
    write_json(draft / CONFIG_FILE, config)
    told = describe_base(artefact, config)
    if config["init"].get("use_lora"):
        known = {"base_model_name_or_path": told.repo, "revision": told.revision}
        write_json(draft / PEFT_FILE, read_json(artefact / PEFT_FILE) | known)
    return told


def without_paths(init: Mapping[str, Any], base: str | None) -> dict[str, Any]:
    """The settings of a network, its base by the place on the hub, or by the name of the file alone."""
    init = json.loads(json.dumps(init))
    for name in PLACES:
        if init.get(name) and not hub_place(init[name]):
            init[name] = PurePath(init[name]).name
    overlay = (init.get("backbone_kwargs") or {}).get("pretrained_cfg_overlay")
    if isinstance(overlay, dict) and overlay.get("file"):
        overlay["file"] = PurePath(overlay["file"]).name
    if base:
        init["backbone_weights" if init.get("backbone_weights") and not init.get("ckpt_path") else "ckpt_path"] = base
    return init


def describe_base(artefact: Path, config: Mapping[str, Any]) -> Base:
    """What the base of a saved network is, as others would look for it."""
    init = config["init"]
    recorded = recorded_base(config)
    fingerprint = recorded.stored or recorded.exact
    if (artefact / BASE_FILE).is_file():
        return Base(f"random weights, which are in this folder ({BASE_FILE})", fingerprint)
    for name in PLACES:
        if place := hub_place(init.get(name)):
            return Base(f"`{place}`", fingerprint, place.repo, place.revision)
        if init.get(name):
            return Base(f"`{init[name]}`, a file that is not published with it", fingerprint, setting=name)
    if init.get("pretrained"):
        import timm

        repo = getattr(timm.get_pretrained_cfg(init["backbone_name"]), "hf_hub_id", None)
        return Base(f"timm's pretrained weights of `{init['backbone_name']}`", fingerprint, repo)
    return Base("random weights", fingerprint)


def data_name(run: Path) -> str | None:
    """The name of the data set that a run was trained on; nothing of where it lay."""
    data = read_yaml(run / "config.yaml", {}).get("data")
    target = data.get("_target_") if isinstance(data, Mapping) else None
    return str(target).rpartition(".")[2] if target else None


def write_picture(picture: Path | None, scores: Sequence[Score], file: Path) -> None:
    """Writes a picture of the user's, or a chart of every class's IoU: images of data sets are not ours to share."""
    if picture:
        from PIL import Image

        with Image.open(picture) as image:
            image.convert("RGB").save(file)
        return
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names, width = list(scores[0].class_iou), 0.8 / len(scores)
    figure, axis = plt.subplots(figsize=(2 + 0.45 * len(names), 3.5), layout="constrained")
    for i, score in enumerate(scores):
        places = [k + (i - (len(scores) - 1) / 2) * width for k in range(len(names))]
        axis.bar(places, [100 * (score.class_iou.get(name) or 0) for name in names], width, label=str(score))
    axis.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axis.set(ylabel="IoU, %", ylim=(0, 100))
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    figure.savefig(file, dpi=100)
    plt.close(figure)


def refuse_paths(draft: Path) -> None:
    """Raises ValueError where a text to be published names a place on this machine."""
    for file in (*draft.glob("*.json"), draft / CARD):
        for found in PATHS.findall(file.read_text(encoding="utf-8")):
            # a single name behind a stroke may be anything, if no such folder is here
            if found.count("/") != 1 or found[0] != "/" or Path(found).exists():
                raise ValueError(f"{file.name} would tell the world of {found}: take it out of the settings or names")


def upload(draft: Path, repo: str, private: bool = False) -> str:
    """Sends a staged folder with the user's own login; returns its place with the commit.

    Raises:
        ValueError: there is no login. ConnectionError: the hub does not take it.
    """
    from huggingface_hub import HfApi

    check_login()
    try:
        api = HfApi()
        api.create_repo(repo, private=private or None, exist_ok=True)
        sent = api.upload_folder(
            repo_id=repo,
            folder_path=draft,
            allow_patterns=list(FILES),
            delete_patterns=list(FILES),  # of another network that was there
            commit_message="Network, settings and card, by EoMT-LoRA",
        )
    except Exception as error:
        raise ConnectionError(
            f"{repo} could not be published ({type(error).__name__}: {one_sentence(error)})"
        ) from error
    return f"hf://{repo}@{sent.oid}"


def check_login() -> None:
    """Raises ValueError where the user is not logged in to the hub."""
    from huggingface_hub import get_token

    if get_token() is None:
        raise ValueError("publishing needs your own login to the hub: `hf auth login`, or a token in HF_TOKEN")
