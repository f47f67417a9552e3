"""The network as it is deployed, one plain module from images to scores, and whether an exported file agrees."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from eomt.data.labels import LabelSet
from eomt.lora.probing import evaluating
from eomt.models.eomt import EoMT
from eomt.settings.formats import EXPORTED, stamped

if TYPE_CHECKING:
    from eomt.training.mask_classification_semantic import MaskClassificationSemantic

Outputs = Literal["classes", "queries"]
Images = Literal["uint8", "float"]
Size = Literal["fixed", "free"]
REPORT = "compare on images of the kind it was trained on, with --images; if they say the same, please report it"
NAMES = {"classes": ("logits",), "queries": ("mask_logits", "class_logits")}  # of what a file returns


@dataclass(frozen=True)
class Signature:
    """What a file takes and returns.

    Args:
        outputs: `classes`: the score of each class for each pixel, [B, K, H, W]; `queries`: the mask logits
            [B, Q, H/4, W/4] and class logits [B, Q, K + 1] that they are made of.
        images: `uint8`: 0 to 255, as decoded; `float`: float32 in [0, 1]. [B, 3, H, W], RGB, never normalised.
        batch: B, or None for any.
        size: `fixed`: H and W are those of the network, `img_size`; `free`: any multiples of its patches.
    """

    outputs: Outputs = "classes"
    images: Images = "uint8"
    batch: int | None = None
    size: Size = "fixed"


ANY_BATCH = Signature()


class Deployed(nn.Module):
    """Images [B, 3, H, W], see `Signature`, to scores of classes or to queries, normalisation and all."""

    def __init__(self, network: EoMT, outputs: Outputs = "classes", size: Size = "fixed") -> None:
        super().__init__()
        self.network, self.outputs, self.size = network, outputs, size

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Returns the tensors of `NAMES`, in float32."""
        pixels = images / 255 if images.dtype == torch.uint8 else images
        encoder, size, sized = self.network.encoder, tuple(images.shape[-2:]), nullcontext()
        if self.size == "free":
            sized = encoder.for_size(size)
            size = tuple(side // encoder.patch_size * encoder.patch_size for side in size)  # what its patches cover
        with self.network.deployed(), sized:
            (mask_logits,), (class_logits,) = self.network(pixels)
        mask_logits, class_logits = mask_logits.float(), class_logits.float()
        if self.outputs == "queries":
            return mask_logits, class_logits
        return (class_scores(mask_logits, class_logits, size),)


def exported(network: EoMT, signature: Signature) -> ExportedProgram:
    """The deployed network as torch.export records it, in float32.

    Raises:
        ValueError: its size cannot be free.
    """
    if signature.size == "free":
        check_free(network)
    free = dict.fromkeys([0] * (signature.batch is None) + [2, 3] * (signature.size == "free"), Dim.DYNAMIC)
    deployed = Deployed(network, signature.outputs, signature.size)
    with evaluating(network), torch.no_grad():
        return torch.export.export(deployed, (examples(network, signature),), dynamic_shapes=(free,))


def check_free(network: EoMT) -> None:
    """Raises ValueError where the network is one for a single size."""
    height, width = network.encoder.img_size
    if not getattr(network.encoder, "takes_any_size", False):
        raise ValueError(
            f"--size free: the positions of this backbone were learnt for images of {height}x{width}, and resampled "
            "they would make another network; leave it out, and cover larger images by windows, as scripts/predict.py "
            "does, or train on a DINOv3, whose positions are computed for any size"
        )


def class_scores(mask_logits: Tensor, class_logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Scores [B, K, H, W]: the whole of what `window_scores` gives in strips of rows."""
    masks = F.interpolate(mask_logits, size, mode="bilinear").sigmoid()
    votes = class_logits.softmax(-1)[..., :-1]  # [B, Q, K], of "no object" none
    return (votes.transpose(1, 2) @ masks.flatten(2)).unflatten(2, size)


def describe(module: MaskClassificationSemantic, signature: Signature, precision: str) -> dict[str, Any]:
    """Returns what a file says of itself, so that it can be used without this project's folders."""
    network = module.network
    classes = LabelSet.of(module.class_names, module.hparams.class_colors)
    statistics = {name: getattr(network.encoder, name, None) for name in ("pixel_mean", "pixel_std")}
    facts = {
        "img_size": list(network.encoder.img_size),
        "class_names": list(classes.names),
        "class_colors": [list(color) for color in classes.colors],
        **asdict(signature),
        "precision": precision,
        # of an adapter that was merged, its own
        "artefact_id": module.artefact_id or module.merged_from.get("artefact_id"),
        "base_fingerprint": module.merged_from.get("base_fingerprint"),
        # for information: the graph has it inside
        **{name: value.flatten().tolist() for name, value in statistics.items() if value is not None},
    }
    return stamped(EXPORTED, facts)


def examples(network: EoMT, signature: Signature) -> Tensor:
    """Images of the shape and type that a file takes, two of them where it takes any number."""
    dtype = torch.uint8 if signature.images == "uint8" else torch.float32
    return torch.zeros(signature.batch or 2, 3, *network.encoder.img_size, dtype=dtype)


def in_batches(run: Callable[[Tensor], Sequence[Tensor]], images: Tensor, signature: Signature) -> list[Tensor]:
    """What a file returns for images uint8 [n, 3, H, W], as many at a time as it takes, the last ones repeated."""
    images = images if signature.images == "uint8" else images / 255
    size = signature.batch or len(images)
    parts = []
    for batch in images.split(size):
        filled = torch.cat([batch, batch[-1:].expand(size - len(batch), -1, -1, -1)])
        parts.append([output[: len(batch)] for output in run(filled)])
    return [torch.cat(outputs) for outputs in zip(*parts, strict=True)]


class Agreement(NamedTuple):
    """How far two networks are apart on the same images.

    difference: the largest of any output, in units of the largest value of that output where that is above 1.
    same: the share of pixels with the same class.
    """

    difference: float
    same: float

    def __str__(self) -> str:
        return f"outputs differ by at most {self.difference:.1e}, the same class on {self.same:.2%} of the pixels"


def compare(
    module: MaskClassificationSemantic, run: Callable[[Tensor], Sequence[Tensor]], signature: Signature, crops: Tensor
) -> Agreement:
    """Compares what a file returns with what the network does in torch, on crops uint8 [n, 3, H, W].

    Where a file takes any size, it is asked at another one, too, and the worse answer counts.

    Args:
        run: the file: images as the signature says, to the tensors of `NAMES`.
    """
    found = [compare_at(module.network, run, signature, crops)]
    if signature.size == "free":
        patch, (height, width) = module.network.encoder.patch_size, crops.shape[-2:]
        others = F.interpolate(crops.float(), (height + patch, width + 2 * patch), mode="bilinear").byte()
        with module.network.encoder.for_size(others.shape[-2:]):
            found.append(compare_at(module.network, run, signature, others))
    differences, shares = (torch.tensor(each) for each in zip(*found, strict=True))
    return Agreement(differences.max().item(), shares.min().item())


@torch.no_grad()
def compare_at(
    network: EoMT, run: Callable[[Tensor], Sequence[Tensor]], signature: Signature, crops: Tensor
) -> Agreement:
    """`compare`, on crops of the network's size."""
    with evaluating(network):
        expected = in_batches(Deployed(network, signature.outputs), crops, signature)
    found = in_batches(run, crops, signature)
    largest = [
        ((a.float() - b).abs().max() / b.abs().max().clamp(min=1)).item() for a, b in zip(found, expected, strict=True)
    ]
    maps = [classes_of(outputs, signature, tuple(crops.shape[-2:])) for outputs in (found, expected)]
    return Agreement(torch.tensor(largest).max().item(), (maps[0] == maps[1]).float().mean().item())


def classes_of(outputs: Sequence[Tensor], signature: Signature, size: tuple[int, int]) -> Tensor:
    """Class maps [n, H, W] from what a file returned."""
    scores = outputs[0] if signature.outputs == "classes" else class_scores(*outputs, size)
    return scores.argmax(1)


def check_agreement(found: Agreement, tolerance: Agreement, what: str, remedy: str = REPORT) -> None:
    """Raises ValueError where a file differs from the network by more than the tolerance, or is not finite."""
    if not found.difference <= tolerance.difference or not found.same >= tolerance.same:
        raise ValueError(
            f"{what} differs from the network by {found.difference:.1e} (at most {tolerance.difference:.0e} is meant) "
            f"and gives {found.same:.2%} of the pixels its class (at least {tolerance.same:.1%} are meant): nothing "
            f"was written; {remedy}"
        )
