"""A data set by its configuration, for command lines that train nothing."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from eomt.data.datamodule import SegmentationDataModule

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # also runs from a checkout that is not installed


def datasets_known() -> list[str]:
    """What `data=` may be."""
    return sorted(path.stem for path in (ROOT / "configs" / "data").glob("*.yaml") if path.stem != "base")


def open_data(
    overrides: Sequence[str], img_size: Sequence[int], batch_size: int
) -> "tuple[str, SegmentationDataModule]":
    """The name of the `data=` choice among the overrides, and its data module.

    Raises:
        ValueError: an override that cannot be applied, or data that is wrong. FileNotFoundError: files are missing.
    """
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException
    from hydra.utils import instantiate
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from eomt.command_line import one_sentence
    from eomt.config_check import check_config

    name = next(override.removeprefix("data=") for override in overrides if override.startswith("data="))
    if name not in datasets_known():
        raise ValueError(f"data={name} is not a dataset; choose from {', '.join(datasets_known())}")
    defaults = [f"+data={name}", f"+model.img_size={list(img_size)}", f"data.batch_size={batch_size}"]
    try:
        with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
            config = compose(overrides=[*defaults, *(o for o in overrides if not o.startswith("data="))])
        check_config(OmegaConf.to_container(config, resolve=True))
        if missing := sorted(OmegaConf.missing_keys(config)):
            raise ValueError(f"{missing[0]} is required: give {missing[0]}=VALUE (see configs/data/{name}.yaml)")
        return name, instantiate(config.data, _convert_="all")
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(one_sentence(error)) from error
