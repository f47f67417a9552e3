"""Trains EoMT on street scenes, with and without LoRA. `python train_with_lora.py --help` shows how."""

import logging
import math
import os
import sys
import traceback
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from eomt.command_line import (
    EXPECTED_ERRORS,
    fail,
    memory_explained,
    one_sentence,
    own_process_state,
    quiet_libraries,
)
from eomt.files import write_text
from eomt.flags import help_text, translate_flags
from eomt.places import CONFIGS, as_typed
from eomt.processes import (
    Interrupted,
    Interruption,
    check_one_folder,
    check_sweep,
    command_to_continue,
    count_processes,
    is_first_process,
    report_interruption,
)
from eomt.settings.sweeps import find_sweep, given_overrides, name_job, name_sweep, no_empty_sweep, report_sweep

log = logging.getLogger(__name__)


def train(cfg, output_dir: Path, interruption: Interruption) -> dict[str, Any]:  # noqa: ANN001
    """Trains one run, from configuration to summary, and returns the summary."""
    from omegaconf import OmegaConf

    from eomt.settings.compose import saved_yaml

    cfg = prepare(cfg, output_dir)
    from eomt.training.run_folder import finished_before, run_folder

    alone = count_processes() == 1  # others would decide by what the first one has written meanwhile
    if alone and cfg.resume == "auto" and (summary := finished_before(output_dir, saved_yaml(cfg))):
        log.info("%s holds this run, finished after %d steps", output_dir, summary["steps"])
        return summary
    with run_folder(output_dir, cfg.resume, OmegaConf.to_container(cfg.model, resolve=True)) as cfg.resume:
        if is_first_process():
            write_text(output_dir / "config.yaml", saved_yaml(cfg))
        return fit(cfg, output_dir, interruption)


def fit(cfg, output_dir: Path, interruption: Interruption) -> dict[str, Any]:  # noqa: ANN001
    """Builds the parts, trains, and returns the summary that it writes."""
    import lightning
    import torch
    from hydra.utils import instantiate

    from eomt.cost.memory_errors import explain_memory
    from eomt.reporting.loggers import finish_loggers
    from eomt.reporting.run_report import finish_run, report_start, validate_last_step
    from eomt.training.end_together import lost_process_explained

    lightning.seed_everything(cfg.seed, workers=True, verbose=False)
    torch.set_float32_matmul_precision("high")
    quiet_libraries()

    datamodule, module = build(cfg)
    callbacks = build_callbacks(cfg, output_dir, interruption)
    trainer = instantiate(
        cfg.trainer,
        callbacks=list(callbacks.values()),
        logger=[instantiate(node, _convert_="all") for node in cfg.logger.values()],
        default_root_dir=output_dir,
        _convert_="all",
    )
    datamodule.check_processes(trainer.world_size)  # before the others are started
    start = report_start(trainer, module, datamodule)
    try:
        explain = partial(explain_memory, trainer, module, datamodule.batch_size)
        with lost_process_explained(), memory_explained(explain):
            if trainer.max_steps != 0:
                trainer.fit(module, datamodule, ckpt_path=cfg.resume, weights_only=True)
            validate_last_step(trainer, module, datamodule)
    finally:  # a run that fails leaves its summary, too, and a signal waits for it
        with interruption.waiting():
            ended_well = sys.exc_info()[1] is None
            try:
                summary = finish_run(trainer, module, datamodule, callbacks, seed=cfg.seed, start=start)
            finally:
                finish_loggers(trainer.loggers, ended_well)
    interruption.check()
    return summary


def prepare(cfg, output_dir: Path) -> Any:  # noqa: ANN001
    """Returns the configuration, completed and checked; the run's folder is not touched before."""
    cfg = choose_lora(cfg)
    cfg.output_dir = str(output_dir)  # under --multirun each job has its own
    check_lora_asked(cfg)
    check_composed(cfg, output_dir)
    return cfg


def check_lora_asked(cfg) -> None:  # noqa: ANN001
    """Warns of LoRA settings on the command line of a run without LoRA; raises ValueError where a sweep varies them."""
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    from eomt.settings.run import unread_lora

    if OmegaConf.select(cfg, "model.use_lora") is not False or cfg.get("variant") or not HydraConfig.initialized():
        return
    unread = unread_lora(given_overrides(HydraConfig.get()))
    sentence = f"{', '.join(unread)} without LoRA, nothing reads it: add --use_lora, or leave it out"
    if any(word.lstrip("+") in str(cfg.get("job")) for word in unread):
        raise ValueError(sentence)
    if unread:
        log.warning("%s", sentence)


def choose_lora(cfg) -> Any:  # noqa: ANN001
    """Composes anew where `lora=auto`, with the preset for the number of training images in its place."""
    if cfg.get("lora_preset") != "auto":
        return cfg
    from hydra import compose
    from hydra.core.hydra_config import HydraConfig

    from eomt.settings.compose import build_data
    from lora_config import preset_for

    check_composed(cfg)
    images = len(build_data(cfg, "see --help").train_set)
    preset = preset_for(images).name
    log.info("lora=auto: %d training images, so lora=%s", images, preset)
    overrides = [word for word in given_overrides(HydraConfig.get()) if not word.startswith("lora=")]
    return compose(HydraConfig.get().job.config_name, [*overrides, f"lora={preset}"])


def check_composed(cfg, output_dir: Path | None = None) -> None:  # noqa: ANN001
    """Checks all that can be known before data and network are built; paths become absolute.

    What needs no torch comes first. `output_dir` is the folder of the run, if it is to start.

    Raises:
        ValueError, OSError: a run would refuse this configuration.
    """
    from omegaconf import OmegaConf

    from eomt.lora.methods import import_method
    from eomt.settings.compose import absolute_paths, name_backbone, read_mappings
    from eomt.settings.config_check import check_config
    from eomt.settings.run import check_output_dir, check_run

    read_mappings(cfg)
    absolute_paths(cfg)
    plain = OmegaConf.to_container(cfg, resolve=True)
    if output_dir:
        check_output_dir(output_dir, cfg.resume)
    check_run(plain, OmegaConf.missing_keys(cfg))
    name_backbone(cfg)
    plain["model"] = OmegaConf.to_container(cfg.model, resolve=True)
    if plain["model"].get("num_classes") is None:
        plain["model"]["num_classes"] = 1  # the data set says, later
    import_method(plain["model"].get("lora_method", "lora"))
    check_config(plain, any_target=plain["allow_any_target"])
    if plain["allow_any_target"]:
        log.warning("allow_any_target=true: whatever the configuration names is imported and called")
    if cfg.resume and cfg.resume != "auto":
        from eomt.training.run_folder import check_resume

        check_resume(cfg.resume, plain["model"])


def build(cfg) -> tuple[Any, Any]:  # noqa: ANN001
    """Builds the data and the module, which learns the classes of the data."""
    from hydra.utils import instantiate

    datamodule = instantiate(cfg.data, _convert_="all")
    datamodule.check_files()
    asked, there = cfg.model.get("num_classes"), datamodule.num_classes
    if asked not in (None, there):
        raise ValueError(f"model.num_classes {asked}: the data set has {there} classes; leave it out")
    return datamodule, instantiate(cfg.model, **datamodule.class_settings, _convert_="all")


def build_callbacks(cfg, output_dir: Path, interruption: Interruption) -> dict[str, Any]:  # noqa: ANN001
    """Builds the callbacks of the configuration, and those that single settings ask for."""
    from hydra.utils import instantiate
    from lightning.pytorch.callbacks import EarlyStopping

    from eomt.settings.trainer import left_out
    from eomt.training.callbacks import first_to_save
    from eomt.training.end_together import EndTogether
    from eomt.training.stop_on_signal import StopOnSignal

    unwanted = left_out(cfg.trainer, cfg.callbacks)
    chosen = {name: node for name, node in cfg.callbacks.items() if name not in unwanted}
    callbacks = {name: instantiate(node, _convert_="all") for name, node in chosen.items()}
    if cfg.patience is not None:
        callbacks["early_stopping"] = EarlyStopping("val/miou", mode="max", patience=cfg.patience)
    if cfg.trunk_cache:
        from eomt.training.trunk_cache import TrunkCache

        callbacks["trunk_cache"] = TrunkCache(cfg.views)
    callbacks["end_together"] = EndTogether()
    callbacks["stop_on_signal"] = StopOnSignal(interruption, output_dir / "checkpoints" / "last.ckpt")
    return first_to_save(callbacks)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: exit code 0; 1 for a run that cannot or must not go on; 2 for a mistyped command; 128 + a signal's
    number for a run that it ended."""
    words = list(sys.argv[1:] if argv is None else argv)
    if {"--help", "-h"} & set(words):
        print(as_typed(help_text(CONFIGS)))
        return 0
    try:
        words = name_sweep(translate_flags(words))
        check_one_folder(words)
    except ValueError as error:
        return fail(error, 2)
    with (
        own_process_state([sys.argv[0], *words]) as full_error,
        Interruption() as interruption,
        no_empty_sweep(words),
    ):
        try:
            return run_with_hydra(words, full_error, interruption)
        except Interrupted as stopped:
            return report_interruption(stopped)


def run_with_hydra(words: Sequence[str], full_error: bool, interruption: Interruption) -> int:
    """Composes the configurations that the command line asks for, and trains: one run, or each of a sweep."""
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from eomt.settings.compose import register_resolvers
    from eomt.settings.hydra_errors import CONFIG_ERRORS, explain_config
    from eomt.settings.hydra_section import checked_hydra
    from eomt.settings.run import found_before
    from eomt.training.run_folder import forgetting

    expected = (*EXPECTED_ERRORS, HydraException, OmegaConfBaseException)
    sweep = find_sweep(words)
    before = found_before(words)
    failed: dict[Path, str] = {}  # of a sweep: the run's folder, and why
    begun: list[Path] = []  # folders of runs

    @hydra.main(config_path=str(CONFIGS), config_name="cityscapes", version_base="1.3")
    def run(cfg) -> float | None:  # noqa: ANN001
        os.environ["HYDRA_FULL_ERROR"] = str(int(full_error))  # for the processes that a run starts
        output_dir = Path(HydraConfig.get().runtime.output_dir)
        forget_start = forgetting(output_dir, f"{HydraConfig.get().job.name}.log", before)
        begun.append(output_dir)
        try:
            if sweep:
                check_sweep(cfg.trainer)
                cfg.group, cfg.job = sweep.name, name_job(HydraConfig.get(), words)
            with memory_explained():
                return train(cfg, output_dir, interruption)["miou"]  # which an optimising sweeper maximises
        except Interrupted as stopped:
            stopped.command = command_to_continue(words, sweep or output_dir)
            raise
        except Exception as error:
            if full_error or not (sweep or isinstance(error, expected)):
                raise
            if not isinstance(error, expected):
                traceback.print_exc()
            failed[output_dir] = one_sentence(error)
            fail(error, 1)
            forget_start()
            return math.nan

    register_resolvers()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # so that a mistyped override arrives here and not as Hydra's own page
    try:
        with checked_hydra():
            run()
    except (HydraException, OmegaConfBaseException, *CONFIG_ERRORS) as error:
        if full_error or (begun and isinstance(error, CONFIG_ERRORS)):  # an error of a run is told there
            raise
        return fail(explain_config(error, words), 2)
    except OSError as error:
        if full_error or begun:
            raise
        return fail(f"the folder of the run cannot be made ({error}): choose another output_dir", 1)
    except SystemExit as ended:  # an option of Hydra's own
        return ended.code or 0
    return report_sweep(sweep, failed) if sweep else int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
