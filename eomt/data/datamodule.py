"""Feeds any pair of segmentation datasets to Lightning."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import islice
from types import MappingProxyType
from typing import Any, Literal

import torch
from lightning import LightningDataModule
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import Compose

from eomt.data import subsets
from eomt.data.dataset import SegmentationDataset
from eomt.data.labels import LabelSet
from eomt.data.sampler import SameOrderSampler, SeededSampler
from eomt.data.sources import Source, Splits, spread
from eomt.data.statistics import class_weights, count_classes
from eomt.data.survey import raise_first, take_survey, without_raising
from eomt.data.transforms import TrainTransform
from eomt.processes import heed_parent_alone

log = logging.getLogger(__name__)

LOOKED_AT = 3000  # images of a split whose files are looked at before a run; all of Cityscapes'


class SegmentationDataModule(LightningDataModule):
    """Augmented training crops in batches, and whole validation images one by one.

    Training batches are `(images uint8 [B, 3, h, w], labels uint8 [B, h, w])`. Validation batches are
    `([image uint8 [3, H, W]], [labels uint8 [H, W]])`, unshuffled, at full resolution; under several processes each
    image is seen by exactly one of them.

    Args:
        train: Training samples; this module adds the augmentation.
        val: Validation samples.
        img_size: (height, width) of a training crop.
        batch_size: Training crops per process and step.
        num_workers: Loader processes; 0 loads in the main process.
        scale_range: See TrainTransform.
        color_jitter: See TrainTransform.
        flip: See TrainTransform.
        class_weights: How `class_weights` follow from the training labels; None for no weights.
        cut_paste: An `eomt.anomaly.cut_paste.CutPaste`: objects of no class on training images, before augmentation.

    Raises:
        ValueError: A split is empty, the splits' classes differ, or a batch needs more images than there are.
    """

    left_out: Mapping[str, int] = MappingProxyType({})  # files of the data's folders in no sample, by reason

    def __init__(
        self,
        train: SegmentationDataset,
        val: SegmentationDataset,
        img_size: Sequence[int],
        batch_size: int = 16,
        num_workers: int = 4,
        scale_range: Sequence[float] = (0.5, 2.0),
        color_jitter: bool = True,
        flip: bool = True,
        class_weights: Literal["inverse", "effective_number"] | None = None,
        cut_paste: Any | None = None,
    ) -> None:
        super().__init__()
        for split, dataset in (("training", train), ("validation", val)):
            if not len(dataset):
                raise ValueError(f"The {split} split has 0 images, it needs at least 1; check the data's settings.")
        if train.classes != val.classes:
            raise ValueError(
                f"Training and validation must have the same classes, got {train.classes.names} and "
                f"{val.classes.names}; read both with one label set."
            )
        if batch_size < 1 or num_workers < 0:
            raise ValueError(
                f"batch_size must be at least 1 and num_workers at least 0, got {batch_size} and {num_workers}."
            )
        if class_weights not in (None, "inverse", "effective_number"):
            raise ValueError(f"class_weights must be null, 'inverse' or 'effective_number', got {class_weights!r}.")
        if not (cut_paste is None or hasattr(cut_paste, "for_classes")):
            raise ValueError(f"data.cut_paste {cut_paste!r}: choose cut-outs with data/cut_paste=toy, coco or folder.")
        self.augment = augment = TrainTransform(img_size, scale_range, color_jitter, flip)
        self.cut_paste = None if cut_paste is None else cut_paste.for_classes(train.classes)
        self.train_set = train.with_transform(Compose([self.cut_paste, augment]) if self.cut_paste else augment)
        self.val_set = val.with_transform(None)
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.weighting = class_weights
        self._check_batch(processes=1)

    @property
    def classes(self) -> LabelSet:
        return self.train_set.classes

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @cached_property
    def class_weights(self) -> list[float] | None:
        """A weight per class for the class loss, or None; the first use reads all training labels."""
        if self.weighting is None:
            return None
        return class_weights(count_classes(self.train_set, self.num_workers), self.weighting)

    @property
    def class_settings(self) -> dict[str, Any]:
        """What a `MaskClassificationSemantic` has to know of the classes: their number, names, colours and weights."""
        names, colors = list(self.classes.names), [list(color) for color in self.classes.colors]
        weights = {"class_weights": self.class_weights}
        return {"num_classes": self.num_classes, "class_names": names, "class_colors": colors} | weights

    def check_files(self) -> None:
        """Looks at the files of a sample of both splits, spread evenly; the others are checked as they are read.

        Logs one line on the data, and warns of labels that can teach or judge nothing; see `eomt.data.survey`.

        Raises:
            ValueError: A picture is half-downloaded, does not fit its labels, or the like; it is named. Or a split has
                no labelled pixel at all.
        """
        looked, errors = 0, []
        for dataset in (self.train_set, self.val_set):
            chosen = spread(len(dataset), LOOKED_AT)
            for sample in (dataset.samples[index] for index in chosen):
                faults = [without_raising(Source.check_image, sample.image)]
                faults += [without_raising(Source.check_mask, sample.label)]
                errors += [error for error in faults if error][:1]
            looked += len(chosen)
        raise_first(errors, looked, len(self.train_set) + len(self.val_set))
        survey = take_survey(self.train_set.with_transform(None), self.val_set, self.augment.largest)
        if rank_zero_only.rank:
            return
        images = len(self.train_set) + len(self.val_set)
        if looked < images:
            log.info("looked at the files of %d of %d images; the others are checked as they are read", looked, images)
        log.info("%s", survey.line(self.left_out))
        for warning in survey.warnings:
            log.warning("%s", warning)

    def setup(self, stage: str) -> None:
        """Looks for a labelled pixel in the images that a run validates on, where these are not all.

        Raises:
            ValueError: There is none.
        """
        limit = self.trainer.limit_val_batches if self.trainer else 1.0
        each = limit if isinstance(limit, int) else int(limit * len(self.val_set) / self._world_size)
        indices = range(min(each * self._world_size, len(self.val_set)))
        if not 0 < len(indices) < len(self.val_set):
            return
        if not any((self.val_set.labels(index) < self.num_classes).any() for index in indices):
            raise ValueError(
                f"trainer.limit_val_batches {limit} validates on {len(indices)} images, which have no labelled pixel; "
                "raise it, or validate on other images."
            )

    def fingerprint(self, hashing: bool = True) -> dict[str, str | int | None]:
        """Hashes and sizes of both splits, and what is pasted, for a run's records.

        With `hashing=False` no file is read: a hash that is not known yet is None.
        """
        facts = {
            "train": self.train_set.fingerprint(hashing),
            "train_images": len(self.train_set),
            "val": self.val_set.fingerprint(hashing),
            "val_images": len(self.val_set),
        }
        if not hashing:
            return facts
        return facts | ({"cut_paste": str(self.cut_paste)} if self.cut_paste else {})

    def check_processes(self, count: int) -> None:
        """Raises ValueError where so many processes have too few images for a step, or for a validation."""
        self._check_batch(count)
        if count > len(self.val_set):
            raise ValueError(
                f"Every process needs a validation image, there are {len(self.val_set)} for {count} processes; use "
                "fewer processes or more images."
            )

    def train_dataloader(self) -> DataLoader:
        """Shuffled, augmented batches: the same for a seed, whatever is trained on them and from wherever resumed."""
        self._check_batch(self._world_size)
        sampler = SameOrderSampler if getattr(self.trainer, "overfit_batches", 0) else SeededSampler
        self.sampler = sampler(self.train_set, self._seed, self._world_size, self._rank)
        return LazyLoader(
            self._batches_done,
            self.train_set,
            batch_size=self.batch_size,
            sampler=self.sampler,
            drop_last=True,
            generator=torch.Generator(),  # so that it draws nothing from the one that training draws from
            **self._workers(),
        )

    def batch_items(self, batch_idx: int) -> list[dict[str, Any]]:
        """Name, index and augmentation seed of each image in a training batch of this epoch, in this process.

        `train_set[index, seed]` is the crop that was trained on.
        """
        start = batch_idx * self.batch_size - self.sampler.start  # after a resumption it begins behind what is done
        chosen = islice(self.sampler, start, start + self.batch_size)
        return [{"name": self.train_set.samples[i].name, "index": i, "seed": seed} for i, seed in chosen]

    def val_dataloader(self) -> DataLoader:
        """Whole images in order, each in exactly one process."""
        sampler = None
        self.check_processes(self._world_size)
        if self._world_size > 1:
            # Lightning's own choice would repeat images to even out the processes, and count them twice.
            sampler = UnrepeatedDistributedSampler(
                self.val_set, num_replicas=self._world_size, rank=self._rank, shuffle=False
            )
        return DataLoader(self.val_set, batch_size=1, sampler=sampler, collate_fn=collate_lists, **self._workers())

    @cached_property
    def _seed(self) -> int:
        return torch.initial_seed()  # before training, which sets it for each batch, also where loaders are made anew

    def _batches_done(self) -> int:
        """Batches of this epoch that the run has trained on, also in an earlier part."""
        return self.trainer.fit_loop.epoch_loop.batch_progress.current.ready if self.trainer else 0

    @property
    def _world_size(self) -> int:
        return self.trainer.world_size if self.trainer else 1

    @property
    def _rank(self) -> int:
        return self.trainer.global_rank if self.trainer else 0

    def _workers(self) -> dict[str, Any]:
        return {
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "pin_memory": torch.cuda.is_available(),
            "worker_init_fn": heed_parent_alone,
        }

    def _check_batch(self, processes: int) -> None:
        needed, there = self.batch_size * processes, len(self.train_set)
        if needed > there:  # with drop_last an epoch would have no step
            raise ValueError(
                f"A step needs batch_size {self.batch_size} x {processes} process(es) = {needed} training images, "
                f"there are {there}; set data.batch_size to {max(1, there // processes)} or less."
            )


def feed(
    splits: Splits,
    train_images: int | None = None,
    hold_out: float | None = None,
    subset_seed: int = 0,
    **loader: Any,
) -> SegmentationDataModule:
    """The data module of these samples, or of a part of those for training.

    Args:
        splits: Training and validation samples.
        train_images: Train on so many of them, see `subsets.choose_images`; None for all.
        hold_out: Validate on this share of the training images, which then do not train, and leave the validation
            images alone: to choose settings by. See `eomt.data.subsets.hold_out`.
        subset_seed: Draws both.
        **loader: See SegmentationDataModule.

    Raises:
        ValueError: There are not as many images, or what SegmentationDataModule raises.
    """
    if train_images is not None:
        splits = splits._replace(train=subsets.choose_images(splits.train, train_images, subset_seed))
    if hold_out is not None:
        train, val = subsets.hold_out(splits.train, hold_out, subset_seed)
        splits = splits._replace(train=train, val=val)
    train, val = (
        SegmentationDataset(part, splits.classes, splits.decode_labels) for part in (splits.train, splits.val)
    )
    data = SegmentationDataModule(train, val, **loader)
    data.left_out = splits.left_out
    return data


class LazyLoader(DataLoader):
    """Begins behind the batches of the epoch that are done.

    Nothing is loaded before the first batch is asked for: on resuming, Lightning iterates before it says the epoch.
    """

    def __init__(self, batches_done: Callable[[], int], *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.batches_done = batches_done

    def __iter__(self) -> Iterator[Any]:
        self.sampler.start = self.batches_done() * self.batch_size
        yield from super().__iter__()


def collate_lists(batch: list[tuple[Tensor, Tensor]]) -> tuple[list[Tensor], list[Tensor]]:
    """Keeps images of different sizes apart: lists instead of stacked tensors."""
    images, labels = zip(*batch, strict=True)
    return list(images), list(labels)
