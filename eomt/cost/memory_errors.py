"""What to lower when training does not fit into memory, with the numbers of the estimate."""

from collections.abc import Iterator
from typing import Any

from lightning import Trainer

from eomt.cost.training_cost import Cost, training_cost
from eomt.inference.prediction import need_less
from eomt.training.mask_classification_semantic import MaskClassificationSemantic
from eomt.training.trunk_cache import TrunkCache, cached_blocks


def cost_of_run(trainer: Trainer, module: MaskClassificationSemantic, batch_size: int, **changes: Any) -> Cost:
    """The cost of a step of this run, with other settings of the model if some are given; see `training_cost`.

    Raises:
        ValueError: a `TrunkCache` that cannot be; see `cached_blocks`.
    """
    cached = any(isinstance(callback, TrunkCache) for callback in trainer.callbacks)
    return training_cost(
        {**module.hparams, **changes},
        batch_size,
        precision=trainer.precision,
        accumulate=trainer.accumulate_grad_batches,
        device=trainer.strategy.root_device.type,
        cached_blocks=cached_blocks(module) if cached else 0,
    )


def explain_memory(trainer: Trainer, module: MaskClassificationSemantic, batch_size: int) -> str:
    """What a step needs by the estimate, and with which settings it needs less; in validation what that needs."""
    height, width = module.hparams.img_size
    if not module.training:  # the trainer's own state is gone when it has handed on the error
        return need_less((height, width), trainer.precision).replace("--precision ", "trainer.precision=")
    less = [f"with {name} {gibibytes(trainer, module, *rest)}" for name, *rest in ways_to_need_less(module, batch_size)]
    now = gibibytes(trainer, module, batch_size)
    return f"a step with data.batch_size={batch_size} at {height}x{width} needs {now}; {', '.join(less)}"


def ways_to_need_less(module: MaskClassificationSemantic, batch_size: int) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Yields overrides of a run, and the batch size and settings of the model that they stand for."""
    if batch_size > 1:
        half = batch_size // 2
        yield f"data.batch_size={half}", half, {}
    else:
        patch = module.network.encoder.patch_size
        size = [max(patch, side // 2 // patch * patch) for side in module.hparams.img_size]
        yield f'"model.img_size=[{size[0]},{size[1]}]"', 1, {"img_size": size}
    if not module.hparams.checkpoint_predictions:
        yield "model.checkpoint_predictions=true", batch_size, {"checkpoint_predictions": True}


def gibibytes(
    trainer: Trainer, module: MaskClassificationSemantic, batch_size: int, changes: dict[str, Any] | None = None
) -> str:
    """The estimated peak of a step in words."""
    try:
        return f"about {cost_of_run(trainer, module, batch_size, **(changes or {})).peak / 2**30:.2f} GiB"
    except Exception:  # there may be no memory left to estimate with, or a module that cannot be estimated
        return "an unknown amount"
