"""Anomaly scores of a network on a benchmark: one forward pass, then every score and temperature from its logits."""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from eomt.anomaly.components import Components, components, together
from eomt.anomaly.datasets import AnomalyDataset
from eomt.anomaly.metrics import PixelMetrics, PixelScores
from eomt.anomaly.scores import SCORES, Variant
from eomt.command_line import memory_explained
from eomt.files import parse_json, replacing
from eomt.inference.prediction import need_less
from eomt.inference.windows import WindowLogits, window_logits
from eomt.lora.probing import evaluating
from eomt.models.eomt import EoMT

Progress = Callable[[Iterable[Any], str], Iterable[Any]]  # items and what is done with them -> the same items
AUTOCAST = {"32-true": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


class LogitCache:
    """Mask and class logits of each frame of a data set, float16 files in a folder.

    Args:
        folder: where they are, or are to be.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def file(self, frame: str) -> Path:
        return self.folder / f"{frame}.safetensors"

    def fill(
        self,
        network: EoMT,
        images: Iterable[tuple[str, Callable[[], Tensor]]],
        device: str = "cpu",
        precision: str = "32-true",
    ) -> None:
        """Runs the network once over each image whose logits are not there yet, or are damaged.

        Args:
            images: (frame, what reads the image uint8 [3, H, W]).
            precision: a key of `AUTOCAST`.

        Raises:
            ValueError: an unknown precision, logits that float16 cannot hold, or no room on the disk.
        """
        if precision not in AUTOCAST:
            raise ValueError(f"precision {precision}: choose from {', '.join(AUTOCAST)}")
        dtype = AUTOCAST[precision]
        self.folder.mkdir(parents=True, exist_ok=True)
        network.to(device)
        with evaluating(network), torch.no_grad(), torch.autocast(device, dtype, enabled=dtype is not None):
            for frame, read in images:
                if not self.is_whole(frame):
                    with memory_explained(partial(need_less, network.encoder.img_size, precision)):
                        (logits,) = window_logits(network, [read()])
                    self.write(frame, logits)

    def is_whole(self, frame: str) -> bool:
        """Whether the frame's file is there and as long as its header says."""
        try:
            with safe_open(self.file(frame), "pt") as file:
                return "sizes" in (file.metadata() or {})
        except (OSError, SafetensorError):
            return False

    def write(self, frame: str, logits: WindowLogits) -> None:
        """Keeps the logits of a frame; a file is there as a whole or not at all."""
        tensors = {"masks": logits.mask_logits.half().cpu().contiguous(), "classes": logits.class_logits.half().cpu()}
        if not all(tensor.isfinite().all() for tensor in tensors.values()):
            raise ValueError(
                f"{frame}: a logit is not finite, or beyond float16: look at the network that it comes from"
            )
        needed = sum(tensor.numel() * 2 for tensor in tensors.values())
        if shutil.disk_usage(self.folder).free < 2 * needed:
            raise ValueError(f"{self.folder} has no room for {needed / 2**20:,.0f} MiB more: give another --cache")
        sizes = {"origins": logits.origins, "window": logits.window, "image_size": logits.image_size}
        with replacing(self.file(frame)) as draft:
            save_file(tensors, draft, {"sizes": json.dumps(sizes)})

    def read(self, frame: str, device: str = "cpu") -> WindowLogits:
        """The logits of a frame, float32.

        Raises:
            ValueError: the file is not there, or is damaged.
        """
        try:
            with safe_open(self.file(frame), "pt") as file:
                sizes = parse_json(file.metadata()["sizes"])
                masks, classes = (file.get_tensor(name).to(device).float() for name in ("masks", "classes"))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{self.file(frame)} is gone or damaged ({error}); score again") from error
        origins = [tuple(origin) for origin in sizes["origins"]]
        return WindowLogits(masks, classes, origins, tuple(sizes["window"]), tuple(sizes["image_size"]))


@torch.no_grad()
def score_maps(logits: WindowLogits, variants: Sequence[Variant]) -> dict[Variant, np.ndarray]:
    """Anomaly scores float32 [H, W] of one image, all of them in one pass over its class scores a class temperature."""
    maps: dict[Variant, list[Tensor]] = {variant: [] for variant in variants}
    for temperature in dict.fromkeys(SCORES[name].class_temperature(t) for name, t in variants):
        for strip in logits.strips(temperature):
            for name, t in variants:
                if SCORES[name].class_temperature(t) == temperature:
                    maps[name, t].append(SCORES[name](strip, t))
    return {variant: torch.cat(strips).cpu().numpy() for variant, strips in maps.items()}


@dataclass(frozen=True)
class Result:
    """The metrics of one score on one data set; `components` is None where they were not asked for."""

    score: str
    temperature: float
    pixels: PixelScores
    components: Components | None

    def as_dict(self) -> dict[str, Any]:
        """For JSON: shares in [0, 1], None for what is undefined or was not asked for."""
        parts = self.components or together([])
        of_parts = {"siou": parts.mean_siou, "ppv": parts.mean_ppv, "component_f1": parts.f1}
        return {
            "score": self.score,
            "temperature": self.temperature,
            **asdict(self.pixels),
            **{key: None if np.isnan(value) else value for key, value in of_parts.items()},
        }


def evaluate(
    cache: LogitCache,
    dataset: AnomalyDataset,
    variants: Sequence[Variant],
    progress: Progress,
    with_components: bool = True,
    device: str = "cpu",
) -> list[Result]:
    """All metrics of all scores on a data set whose logits are cached.

    The first pass ranks pixels; the second one judges components at each score's own threshold of the best pixel F1.

    Raises:
        ValueError: labels that are not the data set's, or nothing to rank.
    """

    def frames(what: str) -> Iterator[tuple[dict[Variant, np.ndarray], np.ndarray]]:
        for index in progress(range(len(dataset)), what):
            yield score_maps(cache.read(dataset.frames[index], device), variants), dataset.labels(index).numpy()

    metrics = {variant: PixelMetrics() for variant in variants}
    for maps, labels in frames("pixels"):
        for variant, scores in maps.items():
            metrics[variant].update(scores, labels)
    pixels = {variant: metrics.pop(variant).compute() for variant in variants}
    judged: dict[Variant, list[Components]] = {variant: [] for variant in variants}
    if with_components:
        for maps, labels in frames("components"):
            for variant, scores in maps.items():
                threshold = pixels[variant].threshold
                judged[variant].append(components(scores, labels, threshold, dataset.benchmark.track))
    return [
        Result(*variant, pixels[variant], together(judged[variant]) if with_components else None)
        for variant in variants
    ]


def export(maps: Iterable[tuple[str, np.ndarray]], folder: str | Path, method: str, dataset: str) -> Path:
    """Writes score maps as the SegmentMeIfYouCan benchmark reads them: `anomaly_p/METHOD/DATASET/FRAME.hdf5`.

    Each file holds one array, float16 [H, W], higher is more anomalous, under the key `value`.

    Args:
        maps: (frame, scores [H, W]) of each image.
    """
    import h5py

    place = Path(folder) / "anomaly_p" / method / dataset
    place.mkdir(parents=True, exist_ok=True)
    for frame, scores in maps:
        with replacing(place / f"{frame}.hdf5") as draft, h5py.File(draft, "w") as file:
            file.create_dataset("value", data=scores.astype(np.float16), compression="gzip", compression_opts=9)
    return place
