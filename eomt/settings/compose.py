"""Composing configurations with Hydra, and building the data that they describe."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eomt.command_line import did_you_mean, one_sentence
from eomt.files import read_yaml
from eomt.settings.config_check import check_config
from eomt.settings.run import check_data

ROOT = Path(__file__).resolve().parents[2]  # holds configs/, train_with_lora.py and scripts/


def datasets_known() -> list[str]:
    """What `data=` may be."""
    return sorted(path.stem for path in (ROOT / "configs" / "data").glob("*.yaml") if path.stem != "base")


def open_data(overrides: Sequence[str], img_size: Sequence[int], batch_size: int) -> tuple[str, Any]:
    """The data set of `data=NAME data.key=value ...`, or of `experiment=NAME data.key=value ...`, and that name.

    Raises:
        ValueError: an override that cannot be applied, or data that is wrong. FileNotFoundError: files are missing.
    """
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    chosen = [override for override in overrides if override.startswith(("data=", "experiment="))]
    if not chosen:
        raise ValueError(f"name a data set: data={', data='.join(datasets_known())}, or experiment=NAME for its data")
    group, name = chosen[0].split("=", 1)
    if group == "data" and name not in datasets_known():
        raise ValueError(f"data={name} is not a dataset; choose from {', '.join(datasets_known())}")
    sizes = [f"++model.img_size={list(img_size)}", f"data.batch_size={batch_size}"]
    try:
        with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
            if group == "data":
                config = compose(overrides=[f"+data={name}", *sizes, *(o for o in overrides if o != chosen[0])])
            else:
                config = compose("cityscapes", [*overrides, *sizes])
        return name, build_data(config, f"see configs/{group}/{name}.yaml")
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(one_sentence(error)) from error


def data_of_run(run: Path, overrides: Sequence[str] = ()) -> tuple[str, Any]:
    """The data set that a run trained on, from its `config.yaml` and any `data.key=value`, and its name.

    Raises:
        ValueError, FileNotFoundError: the folder has no configuration, or the data are gone.
    """
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
        OmegaConf.update(config, key, yaml.safe_load(value))
    return config.data._target_.rsplit(".", 1)[-1], build_data(config, f"see {run / 'config.yaml'}")


def build_data(config: Any, remedy: str) -> Any:
    """The data module that the `data` of a configuration describes, after the same checks as before training."""
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    if missing := sorted(OmegaConf.missing_keys(config.data)):
        raise ValueError(f"data.{missing[0]} is required: give data.{missing[0]}=VALUE ({remedy})")
    plain = OmegaConf.to_container(config.data, resolve=True)
    check_data(plain)
    check_config({"data": plain})
    try:
        return instantiate(config.data, _convert_="all")
    except InstantiationException as error:
        cause = error.__cause__
        raise cause if isinstance(cause, (ValueError, OSError)) else ValueError(one_sentence(error)) from error
