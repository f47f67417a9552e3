"""Composing configurations with Hydra, and building the data that they describe."""

import importlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from yaml import YAMLError

from eomt.command_line import PATH_KEYS, TEXT_KEYS, one_sentence, path_in, quote_path, quoted
from eomt.files import read_yaml
from eomt.places import CONFIGS
from eomt.settings.backbone_choice import choose_backbone
from eomt.settings.config_check import check_config, targets_in
from eomt.settings.hub import hub_place, pinned
from eomt.settings.hydra_errors import CONFIG_ERRORS, explain_config
from eomt.settings.run import check_data, required
from eomt.settings.start import taken_over
from eomt.suggestions import did_you_mean

RESERVED = re.compile(r"_.*_")  # keys that tell `instantiate` how
Described = tuple[str, Any, str]  # name of a data set, its configuration, where to look if a value is missing


def run_name(config: str, experiment: str | None, data: str, model: str, variant: str | None, use_lora: bool) -> str:
    """Names a run by what it trains: `folder_vit_small_lora`, `camvid_head`.

    An experiment, or else a configuration that is not this project's, stands for data and model. YAML has this as the
    resolver `run_name`.
    """
    own = None if (CONFIGS / f"{config}.yaml").is_file() else config
    return "_".join(filter(None, (experiment or own or f"{data}_{model}", variant or ("lora" if use_lora else None))))


def register_resolvers() -> None:
    """Lets OmegaConf know the resolvers of `configs/`."""
    from omegaconf import OmegaConf

    OmegaConf.register_new_resolver("run_name", run_name, replace=True)


@contextmanager
def configurations(folder: Path = CONFIGS) -> Iterator[None]:
    """Lets Hydra compose from a folder in the block, and turns its errors into a ValueError of one sentence."""
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    register_resolvers()
    try:
        with initialize_config_dir(str(folder), version_base="1.3"):
            yield
    except (HydraException, OmegaConfBaseException, *CONFIG_ERRORS) as error:
        raise ValueError(explain_config(error)) from error


def compose_run(overrides: Sequence[str], config_name: str = "cityscapes", folder: Path | None = None) -> Any:
    """Returns the configuration that `train_with_lora.py --config-name CONFIG_NAME OVERRIDES` would have.

    Args:
        overrides: `group=choice`, `key=value`.
        config_name: the file, without its ending, of `configs/` or `folder`.
        folder: of further configurations, as `--config-dir` takes it.

    Raises:
        ValueError: there is no such configuration, or an override cannot be applied.
    """
    from hydra import compose
    from hydra.core.hydra_config import HydraConfig

    first, overrides = CONFIGS, [quote_path(word) for word in overrides]
    if folder:
        own = (folder / f"{config_name}.yaml").is_file()
        first, second = (folder, first) if own else (first, folder)
        overrides.append(f"hydra.searchpath=[{quoted(f'file://{second}')}]")
    with configurations(first):
        config = compose(config_name, overrides, return_hydra_config=True)
    HydraConfig.instance().set_config(config)  # which ${hydra:...} reads
    del config.hydra
    read_mappings(config)
    return config


def matrix_name(overrides: Sequence[str], config_name: str) -> str:
    """Names what a matrix trains, whatever its variants: the experiment, or data and model; see `run_name`."""
    from hydra.core.hydra_config import HydraConfig

    compose_run(overrides, config_name)
    chosen = HydraConfig.get().runtime.choices
    return run_name(config_name, chosen.get("experiment"), chosen["data"], chosen["model"], None, False)


def read_mappings(config: Any) -> None:
    """Reads mappings for a library that the command line hands on as text, since Hydra cannot read their keys.

    Raises:
        ValueError: one is no YAML.
    """
    from omegaconf import DictConfig, OmegaConf

    for key in ("model.backbone_kwargs", "model.lora_options"):
        node = OmegaConf.select(config, key)
        parts = {f"{key}.{name}": node[name] for name in node} if isinstance(node, DictConfig) else {key: node}
        for place, text in parts.items():
            if isinstance(text, str) and text.startswith("{"):
                try:
                    OmegaConf.update(config, place, OmegaConf.create(text), force_add=True)
                except YAMLError as error:
                    raise ValueError(f"{place}={text} is no YAML: {' '.join(str(error).split())}") from error


def absolute_paths(config: Any) -> None:
    """Makes paths begin at the root, so that a run's records hold anywhere; `~` too, which no shell expands here.

    Places on the hub get the commit that they are at now.
    """
    from omegaconf import OmegaConf

    for key in PATH_KEYS:
        path = OmegaConf.select(config, key, throw_on_missing=False)
        part, _, name = key.rpartition(".")
        raw = OmegaConf.to_container(OmegaConf.select(config, part) if part else config, resolve=False) if path else {}
        if (key, path) == ("resume", "auto") or "oc.env" in str(
            raw.get(name)
        ):  # a value that is not to be written down
            continue
        if isinstance(path, str) and key.startswith(("data.", "model.", "resume")):
            on_hub = key.startswith("model.") and hub_place(path)
            absolute = pinned(path) if on_hub else os.path.abspath(os.path.expanduser(path))
            if absolute != path:  # what is absolute already keeps its interpolations
                OmegaConf.update(config, key, absolute)


def name_backbone(config: Any) -> None:
    """Puts what files of weights decide into the settings, so that a run's records say it.

    That is the name of timm's model in the place of null, see `choose_backbone`, and what `taken_over` says.
    """
    model = config.model
    if "backbone_name" in model:
        model.backbone_name = choose_backbone(model.backbone_name, model.get("backbone_weights"))
    if "num_q" in model:
        kwargs = model.get("backbone_kwargs")
        found = taken_over(model.get("ckpt_path"), model.get("load_ckpt_class_head", True), model.num_q, kwargs)
        for name, value in found.items():
            model[name] = value


def saved_yaml(config: Any) -> str:
    """Returns a configuration as YAML for a run's folder: resolved, but for values of the environment.

    `${oc.env:NAME}` stays as it stands, wherever it is used: it may be a key that is nobody else's business.
    """
    from omegaconf import OmegaConf
    from omegaconf.resolvers import oc

    def unread(*words: Any) -> str:
        return "${oc.env:" + ",".join(written(word) for word in words) + "}"

    def written(word: Any) -> str:
        return "null" if word is None else word if "${" in word else quoted(word)

    OmegaConf.register_new_resolver("oc.env", unread, replace=True)
    try:
        content = OmegaConf.to_container(config, resolve=True)
    finally:
        OmegaConf.register_new_resolver("oc.env", oc.env, replace=True)
    return OmegaConf.to_yaml(OmegaConf.create(content))


def plain(config: Any) -> dict[str, Any]:
    """Returns a configuration as a resolved mapping of plain values; raises ValueError where that is impossible."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        return OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise ValueError(one_sentence(error)) from error


def read_settings(words: Sequence[str], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the defaults, and in their place the values of words `KEY=VALUE`, which are read as YAML.

    Raises:
        ValueError: a key without a default, or a value that cannot be read.
    """
    from omegaconf import OmegaConf

    settings = dict(defaults)
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or key not in defaults:
            raise ValueError(f"{word} is no setting{did_you_mean(key, defaults)}")
        try:
            settings[key] = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={value}"]))["value"]
        except YAMLError as error:
            raise ValueError(f"{word} cannot be read: a list looks like {key}=[a,b]") from error
    return settings


def datasets_known() -> list[str]:
    """Returns the names that `data=` may have."""
    return sorted(path.stem for path in (CONFIGS / "data").glob("*.yaml") if path.stem != "base")


def names_data(overrides: Sequence[str]) -> bool:
    """Whether the overrides name a data set, and not only values of one."""
    return any(word.startswith(("data=", "experiment=")) for word in overrides)


def open_data(overrides: Sequence[str], img_size: Sequence[int], batch_size: int) -> tuple[str, Any]:
    """Opens the data set of `data=NAME data.key=value ...`, or that of `experiment=NAME data.key=value ...`.

    Args:
        overrides: as on the command line.
        img_size: (height, width) of training crops, pixels.
        batch_size: images a batch.

    Returns:
        That name, and the data module.

    Raises:
        ValueError: an override that cannot be applied, or data that is wrong. FileNotFoundError: files are missing.
    """
    name, config, remedy = _compose_data(overrides, img_size, batch_size)
    return name, build_data(config, remedy)


def open_data_with_faults(overrides: Sequence[str]) -> tuple[str, Any, dict[str, dict[str, str]]]:
    """Opens a data set as `open_data` does, for a report: what it can go on without is listed instead of raised.

    A data set whose module has a function `tolerant` is opened by it.

    Returns:
        The name, the data module (None where nothing is left to report on), and the sentence on each file by kind.

    Raises:
        ValueError, FileNotFoundError: as `open_data` does.
    """
    name, config, remedy = _compose_data(overrides, [64, 64], 1)  # nothing is trained: any crop and batch will do
    _check_described(config, remedy, files=False)
    data = plain(config.data)
    module = data.pop("_target_").rpartition(".")[0]
    tolerant = getattr(importlib.import_module(module), "tolerant", None)
    if tolerant is None:
        return name, build_data(config, remedy), {}
    return name, *tolerant(**data | {"cut_paste": None})


def data_of_run(run: Path, overrides: Sequence[str] = ()) -> tuple[str, Any]:
    """Opens the data set that a run trained on, by its `config.yaml` and any `data.key=value`.

    Returns:
        The name of its function, and the data module.

    Raises:
        ValueError, FileNotFoundError: the folder has no configuration, or the data are gone.
    """
    name, config, remedy = _read_data_of_run(run, overrides)
    return name, build_data(config, remedy)


def data_for(run: Path, overrides: Sequence[str], img_size: Sequence[int]) -> tuple[str, Any]:
    """Opens the data that the overrides name, or else those of the run; see `open_data` and `data_of_run`."""
    return open_data(overrides, img_size, batch_size=1) if names_data(overrides) else data_of_run(run, overrides)


def check_named_data(overrides: Sequence[str]) -> None:
    """Raises what `open_data` would, as far as it is known without torch."""
    _check_described(*_compose_data(overrides, [64, 64], 1)[1:])


def check_data_for(run: Path, overrides: Sequence[str]) -> None:
    """Raises what `data_for` would, as far as it is known without torch."""
    if names_data(overrides):
        check_named_data(overrides)
    else:
        _check_described(*_read_data_of_run(run, overrides)[1:])


def build_data(config: Any, remedy: str) -> Any:
    """Returns the data module that the `data` of a configuration describes, after the checks before a training.

    Raises:
        ValueError: a value that is missing or wrong; `remedy` says where to look. FileNotFoundError: missing files.
    """
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    _check_described(config, remedy)
    check_config({"data": plain(config.data)}, any_target=bool(config.get("allow_any_target")))
    try:
        return instantiate(config.data, _convert_="all")
    except InstantiationException as error:
        cause = error.__cause__
        raise cause if isinstance(cause, (ValueError, OSError)) else ValueError(one_sentence(error)) from error


def _compose_data(overrides: Sequence[str], img_size: Sequence[int], batch_size: int) -> Described:
    from hydra import compose

    overrides = [quote_path(word) for word in overrides]
    chosen = [override for override in overrides if override.startswith(("data=", "experiment="))]
    if not chosen:
        raise ValueError(f"name a data set: data={', data='.join(datasets_known())}, or experiment=NAME for its data")
    group, name = chosen[0].split("=", 1)
    if group == "data" and name not in datasets_known():
        raise ValueError(f"data={name} is not a dataset; choose from {', '.join(datasets_known())}")
    sizes = [f"++model.img_size={list(img_size)}", f"data.batch_size={batch_size}"]
    with configurations():
        if group == "data":
            config = compose(overrides=[f"+data={name}", *sizes, *(o for o in overrides if o != chosen[0])])
        else:
            config = compose("cityscapes", [*overrides, *sizes])
    return name, opened(config, "the overrides"), f"see configs/{group}/{name}.yaml"


def _read_data_of_run(run: Path, overrides: Sequence[str]) -> Described:
    import yaml
    from omegaconf import OmegaConf

    if not (run / "config.yaml").is_file():
        raise FileNotFoundError(f"{run} has no config.yaml that names its data: give data=NAME")
    try:
        config = OmegaConf.create(read_yaml(run / "config.yaml"))
    except ValueError as error:
        raise ValueError(f"its data are not known, {run / 'config.yaml'} does not say them: {error}") from error
    for override in overrides:
        key, _, value = override.partition("=")
        if OmegaConf.select(config, key, default=config) is config:
            raise ValueError(f"{key} is not in {run / 'config.yaml'}{did_you_mean(key.split('.')[-1], config.data)}")
        OmegaConf.update(config, key, path_in(value) if key in (*PATH_KEYS, *TEXT_KEYS) else yaml.safe_load(value))
    try:
        config = opened(config, run / "config.yaml")
    except ValueError as error:
        raise error if str(run) in str(error) else ValueError(f"{run / 'config.yaml'}: {error}") from error
    return config.data._target_.rsplit(".", 1)[-1], config, f"see {run / 'config.yaml'}"


def opened(config: Any, source: str | Path) -> Any:
    """Returns a configuration that may be somebody else's, if its data are made by this project's data modules alone.

    Raises:
        ValueError: it names anything else, or has no data.
    """
    data = plain(config.data) if isinstance(config.get("data"), Mapping) else None
    if not isinstance(data, Mapping) or "_target_" not in data:
        raise ValueError(f"its data are not known, {source} does not say them: give data=NAME")
    known = sorted(data_targets())
    for place, node in targets_in(data, "data"):
        if node["_target_"] not in known:
            raise ValueError(
                f"{source} names {place}._target_ {node['_target_']!r}: data are opened by what configs/data names, "
                f"{', '.join(known)}, and by nothing else; give data=NAME"
            )
    if odd := [key for key in data if not isinstance(key, str)]:
        raise ValueError(f"{source} has {odd[0]!r} in its data, which is no name: leave it out")
    if reserved := [key for key in keys_in(data) if RESERVED.fullmatch(key) and key != "_target_"]:
        raise ValueError(f"{source} has {reserved[0]} in its data, which names nothing of theirs: leave it out")
    return config


def data_targets() -> set[str]:
    """Everything that the files in `configs/data` name as a `_target_`."""
    files = (CONFIGS / "data").rglob("*.yaml")
    return {node["_target_"] for file in files for _, node in targets_in(read_yaml(file))}


def keys_in(node: Any) -> Iterator[str]:
    """Every key in a plain nested configuration."""
    if isinstance(node, Mapping):
        yield from map(str, node)
    for value in node.values() if isinstance(node, Mapping) else node if isinstance(node, (list, tuple)) else ():
        yield from keys_in(value)


def _check_described(config: Any, remedy: str, files: bool = True) -> None:
    """Raises ValueError or FileNotFoundError for data that can be known to be wrong without torch."""
    from omegaconf import OmegaConf

    if missing := OmegaConf.missing_keys(config.data):
        raise ValueError(f"{required(missing)} ({remedy})")
    check_data(plain(config.data), any_target=bool(config.get("allow_any_target")), files=files)
