"""The output of frozen blocks for every training view, computed once and kept on disk.

Blocks before the first one that trains always give the same tokens for the same pixels. A run that adapts the last
blocks alone can start each step from there.
"""

import hashlib
import json
import logging
import shutil
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning
import torch
from filelock import FileLock
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from eomt.files import cache_folder, read_json, replacing_folder, restored, write_json
from eomt.fingerprints import combine_hashes, hash_tensors
from eomt.lora.probing import evaluating
from eomt.training.mask_classification_semantic import MaskClassificationSemantic

log = logging.getLogger(__name__)

ITEM = {"tokens": torch.bfloat16, "labels": torch.uint8}  # files of a cache, and the type of their numbers
FINISHED = "finished.json"  # written last: the size of each file


class TrunkCache(lightning.Callback):
    """Fills the cache when training starts, and lets the run train from it.

    Args:
        views: augmented views of each image, drawn once with the run's seed; a step takes one of them at random.
        folder: where caches are kept, by what they depend on; None: `$EOMT_CACHE/trunk`, or `~/.cache/eomt/trunk`.

    Raises:
        ValueError: something before the last blocks trains or is random, masked attention is on, or the disk is full.
    """

    def __init__(self, views: int = 8, folder: str | None = None) -> None:
        if views < 1:
            raise ValueError(f"views {views}: at least one of each image")
        self.views = views
        self.folder = Path(folder) if folder else cache_folder("trunk")

    def setup(self, trainer: lightning.Trainer, module: MaskClassificationSemantic, stage: str) -> None:
        if stage != "fit":
            return
        if trainer.world_size > 1:
            raise ValueError(f"trunk_cache with {trainer.world_size} processes: one fills it; set trainer.devices=1")
        depth = cached_blocks(module)
        images = trainer.datamodule.train_set
        self.cache = CachedViews(images, self.views, self.folder / self.key(trainer, module, depth), module, depth)
        trainer.datamodule.train_set = self.cache  # filled once the network is on its device

    def on_fit_start(self, trainer: lightning.Trainer, module: MaskClassificationSemantic) -> None:
        cache = self.cache
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / f".{cache.folder.name}.lock"):  # another run may be at it: wait for its cache
            there = restored(cache.folder).exists()
            if lack := cache.lack():
                if there:
                    log.warning("trunk_cache: %s is not whole (%s): it is filled again", cache.folder, lack)
                with replacing_folder(cache.folder) as draft:
                    cache.fill(draft, trainer, module)
        log.info(
            "trunk_cache: %d views of %d images behind %d blocks, %.1f GiB in %s",
            *(self.views, len(cache), cache.depth, cache.bytes / 2**30, cache.folder),
        )
        with trainer.precision_plugin.forward_context():
            module.train_from(cache.depth)

    def key(self, trainer: lightning.Trainer, module: MaskClassificationSemantic, depth: int) -> str:
        """A hash of everything that tokens and labels depend on."""
        encoder = module.network.encoder
        trunk = {name: tensor for name, tensor in encoder.state_dict().items() if before(name, depth)}
        dataset = trainer.datamodule.train_set
        hp = module.hparams
        facts = {
            "network": [hp.backbone_name, hp.backbone_kwargs, hp.img_size, depth],
            "weights": combine_hashes(hash_tensors(trunk)),
            "data": dataset.fingerprint(),
            "order": dataset.names,
            "labels": [dataset.classes.names, vars(dataset.decode_labels)],
            "augmentation": repr(dataset.transform),
            "views": self.views,
            "seed": torch.initial_seed(),
            "precision": trainer.precision,
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:24]


def before(name: str, depth: int) -> bool:
    """Whether an encoder's tensor is used before block `depth`."""
    parts = name.removeprefix("backbone.").split(".")
    return parts[0] != "norm" and (parts[0] != "blocks" or int(parts[1]) < depth)


def cached_blocks(module: MaskClassificationSemantic) -> int:
    """Counts the blocks that run before anything that trains, the queries included.

    Raises:
        ValueError: none, or their output is not always the same.
    """
    encoder = module.network.encoder
    trained = {name for name, p in encoder.named_parameters() if p.requires_grad}
    depth = len(encoder.blocks) - module.network.num_blocks
    while depth and any(before(name, depth) for name in trained):
        depth -= 1
    if not depth:
        first = next((name for name in sorted(trained) if before(name, 1)), "the queries")
        raise ValueError(
            f"trunk_cache: {first.removeprefix('backbone.')} trains, so that no block's output stays the same; adapt "
            "the last blocks alone (use_lora=true lora_blocks=4, say) or freeze the backbone"
        )
    if module.network.masked_attn_enabled:
        raise ValueError(
            "trunk_cache with masked_attn_enabled=true: it is for networks that are trained already and predict once, "
            "at the end; set model.masked_attn_enabled=false"
        )
    random = {key for key, value in (module.hparams.backbone_kwargs or {}).items() if "drop" in key and value}
    if random:
        raise ValueError(f"trunk_cache with {random.pop()}: frozen blocks must always give the same; set it to 0")
    rope = getattr(encoder.backbone, "rope", None)
    if getattr(rope, "aug_active", False):
        raise ValueError(
            "trunk_cache with rope_rescale_coords, shift or jitter: patch coordinates are random in every step (the "
            'default of DINOv3); train without: "model.backbone_kwargs={rope_rescale_coords: null}"'
        )
    return depth


def check_space(needed: int, folder: Path) -> None:
    """Raises ValueError where the disk has no room."""
    free = shutil.disk_usage(folder).free
    if needed > 0.95 * free:
        raise ValueError(
            f"trunk_cache needs {needed / 2**30:.1f} GiB in {folder}, where {free / 2**30:.1f} GiB are free: take "
            "fewer views, smaller crops, or another disk (EOMT_CACHE)"
        )


class CachedViews(Dataset):
    """Stands in for a `SegmentationDataset` in training: item `(index, seed)` is a view of an image, as the seed says.

    A view is tokens bf16 [P + N, C] (prefix, patches) and label map uint8 [H, W].
    """

    def __init__(
        self, images: Dataset, views: int, folder: Path, module: MaskClassificationSemantic, depth: int
    ) -> None:
        self.images, self.views, self.folder, self.depth = images, views, folder, depth
        self.classes, self.samples = images.classes, images.samples
        self.fingerprint, self.labels = images.fingerprint, images.labels
        encoder = module.network.encoder
        tokens = encoder.num_prefix_tokens + encoder.grid_size[0] * encoder.grid_size[1]
        rows = len(images) * views
        self.shapes = {"tokens": (rows, tokens, encoder.embed_dim), "labels": (rows, *encoder.img_size)}

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor, Tensor]:
        index, seed = item
        row = index * self.views + seed % self.views
        tokens, labels = self.tensors
        return tokens[row].clone(), labels[row].clone()

    @cached_property
    def tensors(self) -> list[Tensor]:
        """Both files, opened when they are first read; raises as `open_tensor` does."""
        return [open_tensor(self.folder / name, shape) for name, shape in self.shapes.items()]

    def __getstate__(self) -> dict[str, Any]:
        # a loader process opens the files by itself: with the tensors it would be sent all of their content
        return {name: value for name, value in vars(self).items() if name != "tensors"}

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each file."""
        return {name: ITEM[name].itemsize * torch.Size(shape).numel() for name, shape in self.shapes.items()}

    @property
    def bytes(self) -> int:
        """On disk."""
        return sum(self.sizes.values())

    def lack(self) -> str | None:
        """Says what keeps the files from being read; None: they are whole, and were finished."""
        for name, size in self.sizes.items():
            if lack := lack_of(self.folder / name, size):
                return lack
        try:
            finished = read_json(self.folder / FINISHED)
        except (ValueError, OSError):
            return f"{FINISHED} is missing or damaged"
        return None if finished == self.sizes else f"{FINISHED} tells other sizes"

    def fill(self, draft: Path, trainer: lightning.Trainer, module: MaskClassificationSemantic) -> None:
        """Runs the frozen blocks over all views, and writes what they give to an empty folder.

        Raises:
            ValueError: the disk has no room.
        """
        check_space(self.bytes, draft)
        rows = self.shapes["tokens"][0]
        seeds = torch.randint(2**62, (rows,), generator=torch.Generator().manual_seed(torch.initial_seed() % 2**62))
        loader = DataLoader(
            self.images,
            batch_size=trainer.datamodule.batch_size,
            sampler=[(row // self.views, seed) for row, seed in enumerate(seeds.tolist())],
            num_workers=trainer.datamodule.num_workers,
            generator=torch.Generator(),
        )
        files = [create_tensor(draft / name, shape) for name, shape in self.shapes.items()]
        done = 0
        with evaluating(module.network), torch.no_grad(), trainer.precision_plugin.forward_context():
            for images, labels in track(loader, "Frozen blocks", transient=True):
                tokens, _ = module.network.trunk(images.to(module.device) / 255, self.depth)
                for file, batch in zip(files, (tokens, labels), strict=True):
                    file[done : done + len(batch)] = batch.to("cpu", file.dtype)
                done += len(images)
        if done != rows:
            raise ValueError(f"trunk_cache: {done} of {rows} views were computed; look at the data set's length")
        write_json(draft / FINISHED, self.sizes)


def open_tensor(path: Path, shape: tuple[int, ...]) -> Tensor:
    """A file on disk as a tensor to read from, also where it is larger than memory; nothing is created or changed.

    Raises:
        ValueError: the file is missing, or of another size.
    """
    size = torch.Size(shape).numel()
    if lack := lack_of(path, ITEM[path.name].itemsize * size):
        raise ValueError(f"trunk_cache: {path.parent}: {lack}; start the run again, which fills the cache anew")
    return torch.from_file(str(path), shared=False, size=size, dtype=ITEM[path.name]).view(shape)


def create_tensor(path: Path, shape: tuple[int, ...]) -> Tensor:
    """A new file of zeros, as a tensor that is written to disk."""
    path.touch(exist_ok=False)
    return torch.from_file(str(path), shared=True, size=torch.Size(shape).numel(), dtype=ITEM[path.name]).view(shape)


def lack_of(path: Path, size: int) -> str | None:
    """Says what is wrong with a file that should have so many bytes; None: nothing."""
    if not path.is_file():
        return f"{path.name} is missing"
    there = path.stat().st_size
    return None if there == size else f"{path.name} has {there:,} bytes, not {size:,}"
