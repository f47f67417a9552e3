"""What the section `hydra` of a configuration may name, checked before Hydra imports it."""

import copy
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import hydra._internal.hydra as hydra_itself
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from eomt.command_line import one_sentence
from eomt.settings.config_check import find_target, targets_in

PLUGINS = ("hydra_plugins.", "hydra._internal.core_plugins.")  # installed launchers and sweepers: Hydra takes no others
# classes of the standard library, colorlog and this project, which write a log
LOGGING = re.compile(r"(logging(\.handlers)?|colorlog|eomt\.command_line)\.[A-Z]\w*")
NAMED = ("()", "class", "queue", "listener")  # keys whose values Python's dictConfig imports
STREAMS = ("ext://sys.stdout", "ext://sys.stderr")
CHOOSES_PROGRAMS = re.compile("PATH|(PYTHON|LD_|DYLD_).*")  # variables of the environment
KNOWN_LATER = {"runtime.output_dir": "folder", "job.id": "0", "job.num": 0}  # with values that name nothing


class CheckedLoader(ConfigLoaderImpl):
    """Composes as Hydra does, for a run, for each run of a sweep and for `--cfg`, and checks what came out."""

    def _process_config_searchpath(self, config_name: str | None, parsed_overrides: list, repo: Any) -> None:
        primary = getattr(repo.load_config(config_path=config_name) if config_name else None, "config", None)
        places = OmegaConf.select(primary, "hydra.searchpath") if OmegaConf.is_dict(primary) else None
        for place in places or ():
            if str(place).startswith("pkg:"):  # which Hydra imports at once; the command line may name one
                raise ValueError(f"hydra.searchpath {place}: a configuration names folders, file://FOLDER, no package")
        super()._process_config_searchpath(config_name, parsed_overrides, repo)

    def load_configuration(self, *args: Any, **kwargs: Any) -> Any:
        config = super().load_configuration(*args, **kwargs)
        if not config.get("allow_any_target"):
            check_hydra(config)
        return config


@contextmanager
def checked_hydra() -> Iterator[None]:
    """Lets Hydra compose in the block with `CheckedLoader`, for which it has no setting."""
    hydra_itself.ConfigLoaderImpl = CheckedLoader
    try:
        yield
    finally:
        hydra_itself.ConfigLoaderImpl = ConfigLoaderImpl


def check_hydra(config: Any) -> None:
    """Raises ValueError where the section `hydra` names what this project, its libraries and a log do not need."""
    section = copy.deepcopy(config).hydra
    for key in KNOWN_LATER:
        OmegaConf.update(section, key, KNOWN_LATER[key])
    for part in ("sweeper", "launcher", "callbacks"):
        for place, node in targets_in(_plain(section, part), f"hydra.{part}"):
            name = node["_target_"]
            plugin = place in ("hydra.sweeper", "hydra.launcher") and str(name).startswith(PLUGINS)
            if not plugin:
                find_target(name, f"{place}._target_")
    for part in ("hydra_logging", "job_logging"):
        check_logging(_plain(section, part), f"hydra.{part}")
    for name in section.job.env_set:
        if CHOOSES_PROGRAMS.fullmatch(str(name).upper()):
            raise ValueError(f"hydra.job.env_set.{name}: it decides which programs run; set it in the shell")


def _plain(section: Any, part: str) -> Any:
    try:
        return OmegaConf.to_container(OmegaConf.create({part: section[part]}, parent=section), resolve=True)[part] or {}
    except OmegaConfBaseException as error:
        raise ValueError(f"hydra.{part} cannot be checked: {one_sentence(error)}") from error


def check_logging(node: Any, place: str) -> None:
    """Walks the settings of a log; raises ValueError where one names what writes no log."""
    for key, value in node.items() if isinstance(node, Mapping) else enumerate(node):
        where = f"{place}.{key}"
        named = key in NAMED and not (isinstance(value, str) and LOGGING.fullmatch(value))
        if named or (isinstance(value, str) and value.startswith(("ext://", "cfg://")) and value not in STREAMS):
            raise ValueError(
                f"{where} {value!r}: a log is written by classes of logging, colorlog or this project; set "
                "allow_any_target=true if it is meant"
            )
        if isinstance(value, (Mapping, list)):
            check_logging(value, where)
