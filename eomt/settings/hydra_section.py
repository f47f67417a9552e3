"""What the section `hydra` of a configuration may name, checked before Hydra imports it."""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import hydra._internal.hydra as hydra_itself
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from omegaconf import OmegaConf

from eomt.settings.config_check import find_target

PLUGINS = ("hydra_plugins.", "hydra._internal.core_plugins.")  # installed launchers and sweepers: Hydra takes no others
SAMPLER = re.compile(r"optuna\.samplers\.[A-Z]\w*")
COMMANDS = ("setup", "srun_args", "additional_parameters", "python", "custom_search_space")  # settings of theirs
# classes of the standard library, colorlog and this project, which write a log
LOGGING = re.compile(r"(logging(\.handlers)?|colorlog|eomt\.command_line)\.[A-Z]\w*")
NAMED = ("()", "class", "queue", "listener")  # keys whose values Python's dictConfig imports
STREAMS = ("ext://sys.stdout", "ext://sys.stderr")
PLACED = ("/", "./")  # how a path begins that cannot turn into `ext://...`
HARMLESS = re.compile(
    r"(OMP|MKL|OPENBLAS|NUMEXPR)_NUM_THREADS|CUDA_VISIBLE_DEVICES|HF_HUB_OFFLINE|WANDB_MODE|EOMT_CACHE"
)
FOLDER = re.compile(r"file://.*|\.?/.*|[^$:]*")  # of places to search; packages are imported at once
REMEDY = "set allow_any_target=true if it is meant"


class CheckedLoader(ConfigLoaderImpl):
    """Composes as Hydra does, for a run, for each run of a sweep and for `--cfg`, and checks what came out."""

    def _process_config_searchpath(self, config_name: str | None, parsed_overrides: list, repo: Any) -> None:
        primary = getattr(repo.load_config(config_path=config_name) if config_name else None, "config", None)
        plain = OmegaConf.to_container(primary, resolve=False) if OmegaConf.is_dict(primary) else {}
        section = plain.get("hydra") or {}
        places = (section.get("searchpath") or []) if isinstance(section, Mapping) else section
        for place in places if isinstance(places, list) else [places]:  # the command line may name packages, too
            if not FOLDER.fullmatch(str(place)):
                raise ValueError(f"hydra.searchpath {place}: a configuration names folders, file://FOLDER, no package")
        super()._process_config_searchpath(config_name, parsed_overrides, repo)

    def load_configuration(self, *args: Any, **kwargs: Any) -> Any:
        config = super().load_configuration(*args, **kwargs)
        if not config.get("allow_any_target"):
            check_hydra(config.hydra)
        return config


@contextmanager
def checked_hydra() -> Iterator[None]:
    """Lets Hydra compose in the block with `CheckedLoader`, for which it has no setting."""
    hydra_itself.ConfigLoaderImpl = CheckedLoader
    try:
        yield
    finally:
        hydra_itself.ConfigLoaderImpl = ConfigLoaderImpl


def check_hydra(section: Any) -> None:
    """Raises ValueError where the section `hydra` names what this project, its libraries and a log do not need.

    Interpolations are not resolved, since some are known later: what is named is written out.
    """
    parts = OmegaConf.to_container(section, resolve=False)
    for part in ("sweeper", "launcher", "callbacks"):
        check_targets(parts[part] or {}, f"hydra.{part}")
    check_logging(parts["hydra_logging"] or {}, "hydra.hydra_logging")
    # by then Hydra has put the absolute path of the run's folder there, whatever the configuration says
    check_logging(parts["job_logging"] or {}, "hydra.job_logging", (*PLACED, "${hydra.runtime.output_dir}"))
    variables = parts["job"]["env_set"]
    for name, value in variables.items() if isinstance(variables, Mapping) else [(variables, None)]:
        if not HARMLESS.fullmatch(str(name)) and os.environ.get(str(name)) != value:
            raise ValueError(f"hydra.job.env_set.{name}: it may decide which programs run; set it in the shell")


def check_targets(node: Any, place: str) -> None:
    """Walks plugins and callbacks; raises ValueError where one is none of this project and its libraries."""
    if isinstance(node, str) and re.fullmatch(r"\$\{.*\}", node) and node != "${hydra.job.name}":
        raise ValueError(f"{place} {node}: write out what is meant, so that it can be checked, or {REMEDY}")
    for key, value in _entries(node):
        where = f"{place}.{key}"
        if key == "_target_":
            plugin = place in ("hydra.sweeper", "hydra.launcher") and str(value).startswith(PLUGINS)
            sampler = place == "hydra.sweeper.sampler" and SAMPLER.fullmatch(str(value))
            if not plugin and not sampler:
                find_target(value, where)
        elif key in COMMANDS and value:
            raise ValueError(f"{where} {value!r}: it is run or imported; give it on the command line and {REMEDY}")
        else:
            check_targets(value, where)


def check_logging(node: Any, place: str, placed: tuple[str, ...] = PLACED) -> None:
    """Walks the settings of a log; raises ValueError where one names what writes no log.

    `placed` are beginnings of paths: what follows them may be known later.
    """
    if isinstance(node, str) and node not in STREAMS:
        changing = "${" in node and not node.startswith(placed)
        if changing or node.startswith(("ext://", "cfg://")):
            raise ValueError(f"{place} {node!r}: a log has the streams {' and '.join(STREAMS)}, and files; {REMEDY}")
    for key, value in _entries(node):
        if key in NAMED and not (isinstance(value, str) and LOGGING.fullmatch(value)):
            raise ValueError(
                f"{place}.{key} {value!r}: a log is written by classes of logging, colorlog or this project; {REMEDY}"
            )
        check_logging(value, f"{place}.{key}", placed)


def _entries(node: Any) -> list[tuple[Any, Any]]:
    return list(node.items()) if isinstance(node, Mapping) else list(enumerate(node)) if isinstance(node, list) else []
