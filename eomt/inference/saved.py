"""Finds what a run saved: the folder, the checkpoint or the file of weights that a path means; torch is not needed."""

import importlib.util
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from eomt import __version__
from eomt.files import PICTURES, read_json, restored
from eomt.lora.saved_config import CONFIG_FILE as ADAPTER_CONFIG
from eomt.settings.backbone_choice import plain_backbone
from eomt.settings.backbone_files import places_in
from eomt.settings.backbones import NO_EOMT
from eomt.settings.config_check import argument_types, check_type
from eomt.settings.eomt_files import read_eomt_file
from eomt.settings.eomt_names import PUBLISHED
from eomt.settings.formats import ARTEFACT, SUMMARY, read_format, refuse_exported
from eomt.settings.hub import here, named_on_hub
from eomt.settings.model import ModelSettings
from eomt.suggestions import did_you_mean, not_found
from lora_config import import_peft

ARTEFACTS = ("adapter", "model")  # folders that a run ships one of
SAVED = "give the adapter/ or model/ folder of a run, the run's folder, or its checkpoints/best.ckpt"
NO_WEIGHTS = (*PICTURES, ".yaml", ".yml", ".json", ".csv", ".txt", ".md", ".log")
EXTRACTION_FILE = "extraction.json"  # beside an adapter that was made out of a full fine-tune
CONFIG_FILE, WEIGHTS_FILE, HEADS_FILE, BASE_FILE = (
    "eomt_config.json",
    "model.safetensors",
    "heads.safetensors",
    "base.safetensors",
)


def find_artefact(path: str | Path) -> Path:
    """Returns the adapter or model folder that is meant, or the Lightning checkpoint; a run folder means what it holds.

    A repository of the hub, `user/name@revision`, is fetched.

    Raises:
        FileNotFoundError: there is nothing of the kind. ValueError: bare weights, or a run folder that holds both.
    """
    path = here(path)
    if path.is_file():
        if path.suffix == ".ckpt":
            return path
        if (path.parent / CONFIG_FILE).is_file():
            raise ValueError(f"{path} is a part of what was saved: give its folder, {path.parent}")
        if path.suffix in NO_WEIGHTS:
            raise ValueError(f"{path} is no saved network: {SAVED}")
        refuse_exported(path)
        refuse_other_program(path)
        raise ValueError(bare_weights(path))
    if not path.exists():
        raise FileNotFoundError(not_found(path))
    if (path / CONFIG_FILE).is_file():
        return path
    found = [folder for name in ARTEFACTS if ((folder := restored(path / name)) / CONFIG_FILE).is_file()]
    if len(found) > 1:
        raise ValueError(f"{path} holds both adapter/ and model/: give one of them, for example {found[0]}")
    if not found:
        refuse_other_program(path)
        if plain_backbone(path):
            raise ValueError(bare_weights(path))
        raise FileNotFoundError(f"{path} has no {CONFIG_FILE}, and no adapter/ or model/ with one: {SAVED}")
    return found[0]


def refuse_other_program(path: Path) -> None:
    """Raises ValueError where a path holds another program's network, naming it and what makes one of ours of it."""
    if (path / HEADS_FILE).exists():  # one of ours, whose configuration is gone
        return
    what, target = "an adapter of PEFT", "adapter"
    if not (path / ADAPTER_CONFIG).is_file():
        try:
            file = read_eomt_file(path)
        except (ValueError, OSError):  # nothing that is known, which the caller says
            return
        if path.is_file() and file.program == PUBLISHED:  # as ours are saved, too
            return
        what, target = str(file), "eomt"
    raise ValueError(
        f"{path} is {what}: first make it one of this project, python scripts/convert.py {path} OUT --to {target}"
    )


def check_artefact(path: str | Path) -> Path:
    """Returns `find_artefact`, after what can be known of a folder without torch.

    Raises:
        ValueError, FileNotFoundError: it is no saved network. ImportError: it is an adapter, and PEFT is missing.
    """
    found = find_artefact(path)
    if found.is_dir():
        config = read_config(found)
        check_settings(config, found / CONFIG_FILE)
        check_peft(config)
    return found


def find_weights(path: str | Path) -> Path:
    """Returns the file of weights or the folder that is meant; raises as `find_artefact` does."""
    path = here(path)
    ours = any((path / name / CONFIG_FILE).is_file() for name in ("", *ARTEFACTS))
    if path.is_dir() and not ours and (places := places_in(path)):  # as from a hub
        return places[0]
    in_folder = path.is_file() and (path.parent / CONFIG_FILE).is_file() and path.name != BASE_FILE
    return path.parent if in_folder else path if path.is_file() else find_artefact(path)


def run_of(path: Path) -> Path:
    """Returns the run's folder that an artefact or checkpoint lies in, or the folder itself."""
    folder = path if path.is_dir() else path.parent
    return next((place for place in (folder, folder.parent) if (place / "config.yaml").is_file()), folder)


def results_of(path: str | Path, kind: str) -> Path:
    """Returns the folder for a network's results, to which no other network of its run writes.

    It is `kind` in the run's folder for what the run ships, and in there a folder of its own for a merged network, a
    checkpoint or the like. Raises as `find_artefact` does.
    """
    if place := named_on_hub(path):
        raise ValueError(f"{place} is on the hub, and no run's folder lies around it: give a folder with --output_dir")
    path = Path(path).expanduser()
    run, found = run_of(path), find_artefact(path)
    if is_shipped(found, run):
        return run / kind
    return run / kind / (found.stem if found.is_file() else found.name)


def is_shipped(found: Path, run: Path) -> bool:
    """Whether a folder is the network that a run ended with, or belongs to no run."""
    name = read_format(run / "summary.json", SUMMARY, {}).get("artefact")
    return found == run or (found.parent == run and found.name in ((name,) if name else ARTEFACTS))


def keep_other_network(file: Path, artefact_id: str | None) -> None:
    """Raises ValueError where a file holds scores of another network; one of an earlier version does not tell."""
    if file.is_file() and read_json(file).get("artefact_id") != artefact_id:
        raise ValueError(f"{file} holds scores of another network: give another folder with --output_dir")


def bare_weights(path: Path) -> str:
    """Returns the sentence for weights that say nothing of the network they belong to."""
    if backbone := plain_backbone(path):
        return f"{path} holds {backbone}, {NO_EOMT}: start a training from it with model.backbone_weights={path}"
    return (
        f"{path} holds weights without a configuration, so the network they belong to is not known: to evaluate them, "
        f"name it and its data: python train_with_lora.py variant=none model.ckpt_path={path} data.root=..., with the "
        "model= or experiment= that it was trained with"
    )


def read_config(directory: Path) -> dict[str, Any]:
    """Returns what `save_pretrained` wrote: `init` are the settings of the network, completed by nothing.

    Raises:
        ValueError: it is no such file, or of a version to come.
    """
    file = directory / CONFIG_FILE
    config = read_format(file, ARTEFACT)
    init = config.get("init")
    if not isinstance(init, Mapping):
        raise ValueError(f"{file} has no settings in `init`: it is no file of a saved network, or was edited")
    if absent := [name for name in ("img_size", "num_classes") if name not in init]:
        raise ValueError(f"{file}: `init` has no {absent[0]}: put back what was saved")
    return config


def check_settings(
    config: Mapping[str, Any], file: Path, names: Collection[str] | None = None, kind: type = ModelSettings
) -> None:
    """Raises ValueError where the settings of a saved network are none of `names`, or have values they cannot have.

    Args:
        config: as `read_config` returns it, or a Lightning checkpoint with its settings as `init`.
        file: to name.
        names: of all settings that the network takes; None: what is not known is passed over.
        kind: the dataclass of most of them.
    """
    init, hints = config["init"], argument_types(kind)[0]
    for name, value in init.items():
        if names is not None and name not in names:
            raise ValueError(
                f"{file}: {name} is unknown{did_you_mean(str(name), names)}; it was written by eomt-lora "
                f"{config.get('eomt_lora', 'of an unknown version')}, this is {__version__}"
            )
        if name in hints:
            check_type(value, hints[name], f"{file}: {name}")
    try:
        kind.of(
            {**init, "ckpt_path": None, "backbone_weights": None, "base_dtype": "float32"} | {"base_quantisation": None}
        )  # the base is looked for later
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def check_peft(config: Mapping[str, Any]) -> None:
    """Raises ImportError where an adapter is to be opened and PEFT is missing."""
    if config["init"].get("use_lora") and importlib.util.find_spec("peft") is None:
        import_peft()


def artefact_id_in(directory: Path) -> str | None:
    """Returns the id of the network in a folder; None for one of an earlier version."""
    return read_config(directory).get("artefact_id") if (directory / CONFIG_FILE).is_file() else None


def shipped(run: Path) -> Path:
    """Returns the folder of the network that a run ended with; ValueError where its summary names none."""
    file = run / "summary.json"
    name = read_format(file, SUMMARY).get("artefact")
    if name not in ARTEFACTS:
        raise ValueError(f"{file} names as artefact {name!r}: one of {' or '.join(ARTEFACTS)} in its folder is meant")
    return run / name


def check_shipped(directory: Path) -> None:
    """Raises ValueError where the run that a folder lies in tells of another network than the folder holds.

    A run of an earlier version names no id, and nothing can be compared. Of other networks in a run's folder, as merged
    ones, it tells nothing.
    """
    if not is_shipped(directory, directory.parent):
        return
    file = directory.parent / "summary.json"
    found, wanted = artefact_id_in(directory), read_format(file, SUMMARY, {}).get("artefact_id")
    if wanted and found and found != wanted:
        raise ValueError(
            f"{directory} is another network ({found[:12]}) than {file} tells of ({wanted[:12]}): its scores would be "
            "taken for those of that run; put the run's own artefact back, or move this one out of the run's folder"
        )
