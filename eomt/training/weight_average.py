"""An average of the weights over the steps of a run, which is scored and saved in their place."""

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn


class EMA(WeightAveraging):
    """Exponential moving average after every optimiser step; validations and the end of the run see it.

    Unlike Lightning's `EMAWeightAveraging` it leaves weights that do not change, such as the base under LoRA, as they
    are, bit for bit, and it lies on the device of the network.

    Args:
        decay: share of the average that stays in each step, from 0 up to below 1.
    """

    def __init__(self, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay {decay}: a share from 0 up to below 1 is meant; 0.999 averages some 1000 steps")
        average = get_ema_multi_avg_fn(decay)

        def average_numbers(averages: list[Tensor], weights: list[Tensor], count: int) -> None:
            if averages[0].is_floating_point():  # the codes of a base in 8 or 4 bits are no numbers to average
                average(averages, weights, count)

        super().__init__(use_buffers=False, multi_avg_fn=average_numbers)

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._average_model.to(module.device)  # Lightning makes it before it moves the network
