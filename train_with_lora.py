"""Trains EoMT on street scenes, with and without LoRA. `python train_with_lora.py --help` shows how."""

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eomt.command_line import EXPECTED_ERRORS, fail, help_text, own_process_state, quiet_libraries, translate_flags

CONFIGS = Path(__file__).parent / "configs"


def train(cfg, output_dir: Path) -> None:  # noqa: ANN001
    """One run, from configuration to summary."""
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    cfg = choose_lora(cfg)
    cfg.output_dir = str(output_dir)  # under --multirun each job has its own
    absolute_paths(cfg)
    first = os.environ.get("LOCAL_RANK", "0") == "0"  # of several processes, the one that touches the folder
    if first:
        refuse_earlier_run(output_dir, cfg.resume)
    check(cfg)
    if first:
        keep_earlier_metrics(output_dir)
        OmegaConf.save(cfg, output_dir / "config.yaml", resolve=True)

    import lightning
    import torch

    from eomt.fingerprints import identify
    from eomt.reporting.run_report import estimate_cost, finish_run, print_start, validate_last_step

    lightning.seed_everything(cfg.seed, workers=True, verbose=False)
    torch.set_float32_matmul_precision("high")
    quiet_libraries()

    callbacks = {name: instantiate(node, _convert_="all") for name, node in cfg.callbacks.items()}
    datamodule = instantiate(cfg.data, _convert_="all")
    datamodule.check_files()
    module = instantiate(cfg.model, **classes_of(datamodule, cfg.model.get("num_classes")), _convert_="all")
    if cfg.patience is not None:
        stop = lightning.pytorch.callbacks.EarlyStopping("val/miou", mode="max", patience=cfg.patience)
        callbacks["early_stopping"] = stop
    if cfg.trunk_cache:
        from eomt.training.trunk_cache import TrunkCache

        callbacks["trunk_cache"] = TrunkCache(cfg.views)
    loggers = [instantiate(node, _convert_="all") for node in cfg.logger.values()]
    trainer = instantiate(
        cfg.trainer, callbacks=list(callbacks.values()), logger=loggers, default_root_dir=output_dir, _convert_="all"
    )

    print_start(module, datamodule, trains=trainer.max_steps != 0)
    cost = estimate_cost(trainer, module, datamodule.batch_size)
    start = identify(module.network, module.network.drawn)  # before training, fresh adapters left out
    try:
        if trainer.max_steps != 0:
            trainer.fit(module, datamodule, ckpt_path=cfg.resume, weights_only=True)
        validate_last_step(trainer, module, datamodule)
    finally:  # a run that fails leaves its summary, too
        finish_run(trainer, module, datamodule, callbacks, output_dir, cfg.seed, start=start, cost=cost)


def choose_lora(cfg) -> Any:  # noqa: ANN001
    """`lora=auto` becomes the preset for the number of training images, as if that had been asked for."""
    if cfg.get("lora_preset") != "auto":
        return cfg
    from hydra import compose
    from hydra.core.hydra_config import HydraConfig
    from hydra.utils import instantiate

    check_composed(cfg)
    images = len(instantiate(cfg.data, _convert_="all").train_set)
    preset = preset_for(images)
    logging.getLogger(__name__).info("lora=auto: %d training images, so lora=%s", images, preset)
    overrides = [word for word in HydraConfig.get().overrides.task if not word.startswith("lora=")]
    return compose(HydraConfig.get().job.config_name, [*overrides, f"lora={preset}"])


def preset_for(images: int) -> str:
    """The LoRA preset for a number of training images."""
    return "small" if images < 2000 else "medium" if images <= 5000 else "large"


def check_composed(cfg) -> None:  # noqa: ANN001
    """Raises ValueError or OSError where a run would refuse this configuration; its paths become absolute."""
    absolute_paths(cfg)
    check(cfg)


def check(cfg) -> None:  # noqa: ANN001
    """Everything that can be known to be wrong before data and network are built; first of all what needs no torch."""
    from omegaconf import OmegaConf

    from eomt.lora.methods import import_method
    from eomt.settings.config_check import check_config
    from eomt.settings.run import check_run

    plain = OmegaConf.to_container(cfg, resolve=True)
    check_run(plain, OmegaConf.missing_keys(cfg))
    if plain["model"].get("num_classes") is None:
        plain["model"]["num_classes"] = 1  # the data set says, later
    import_method(plain["model"].get("lora_method", "lora"))
    check_config(plain)
    if cfg.resume:
        check_resume(cfg.resume, plain["model"])


def check_resume(checkpoint: str, model: dict[str, Any]) -> None:
    """Raises ValueError where a run cannot go on from there; nothing has been touched yet."""
    from eomt.inference.artefacts import read_lightning
    from eomt.settings.model import check_same_settings

    content = read_lightning(Path(checkpoint))
    if "optimizer_states" not in content:
        raise ValueError(
            f"resume {checkpoint}: it is no checkpoint of a run; give checkpoints/last.ckpt of one, or start a new run "
            "from these weights with model.ckpt_path"
        )
    derived = ("num_classes", "class_names", "class_colors", "class_weights")  # the data say
    asked = {key: value for key, value in model.items() if key not in derived}
    check_same_settings(content.get("hyper_parameters", {}), asked)


def absolute_paths(cfg) -> None:  # noqa: ANN001
    """Paths from the root, so that the run's records hold anywhere; `~` too, which no shell expands behind a `key=`."""
    from omegaconf import OmegaConf

    files = ("root", "images", "masks", "val_images", "val_masks", "classes")
    for key in (*(f"data.{name}" for name in files), "model.ckpt_path", "resume"):
        path = OmegaConf.select(cfg, key, throw_on_missing=False)
        if isinstance(path, str):
            OmegaConf.update(cfg, key, os.path.abspath(os.path.expanduser(path)))


def refuse_earlier_run(output_dir: Path, resume: str | None) -> None:
    """Raises ValueError where the folder holds a run that is not continued: it is not written over."""
    if (output_dir / "metrics.csv").is_file() and not resume:
        raise ValueError(f"output_dir {output_dir} holds a run: choose another folder, or continue it with resume=")


def keep_earlier_metrics(output_dir: Path) -> None:
    """A run that goes on in its folder keeps the metrics so far under another name."""
    metrics = output_dir / "metrics.csv"
    if metrics.is_file():
        metrics.rename(output_dir / f"metrics_{len(list(output_dir.glob('metrics*.csv')))}.csv")


def classes_of(datamodule, num_classes: int | None) -> dict:  # noqa: ANN001
    """Returns the settings of the model that the data set's classes decide."""
    if num_classes not in (None, datamodule.num_classes):
        raise ValueError(
            f"model.num_classes {num_classes}: the data set has {datamodule.num_classes} classes; leave it out"
        )
    return {
        "num_classes": datamodule.num_classes,
        "class_weights": datamodule.class_weights,
        "class_names": list(datamodule.classes.names),
        "class_colors": [list(color) for color in datamodule.classes.colors],
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: exit code 0; 1 for a run that cannot or must not go on; 2 for a mistyped command."""
    words = list(sys.argv[1:] if argv is None else argv)
    if {"--help", "-h"} & set(words):
        print(help_text(CONFIGS))
        return 0
    try:
        words = translate_flags(words)
    except ValueError as error:
        return fail(error, 2)
    with own_process_state([sys.argv[0], *words]) as full_error:
        return run_with_hydra(full_error)


def run_with_hydra(full_error: bool) -> int:
    """Composes the configuration that the command line asks for, and trains."""
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    @hydra.main(config_path=str(CONFIGS), config_name="cityscapes", version_base="1.3")
    def run(cfg) -> None:  # noqa: ANN001
        os.environ["HYDRA_FULL_ERROR"] = str(int(full_error))  # for the processes that a run starts
        try:
            train(cfg, Path(HydraConfig.get().runtime.output_dir))
        except (*EXPECTED_ERRORS, HydraException, OmegaConfBaseException) as error:
            if full_error:
                raise
            sys.exit(fail(error, 1))

    os.environ["HYDRA_FULL_ERROR"] = "1"  # so that a mistyped override arrives here and not as Hydra's own page
    try:
        run()
    except (HydraException, OmegaConfBaseException) as error:
        if full_error:
            raise
        return fail(error, 2)
    except SystemExit as ended:  # a job that failed, or an option of Hydra's own
        return ended.code or 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
