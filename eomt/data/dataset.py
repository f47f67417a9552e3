"""Pairs of images and label maps as tensors."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2.functional import pil_to_tensor

from eomt.data.identity import fingerprint
from eomt.data.labels import LabelSet
from eomt.data.masks import refuse_turned
from eomt.data.pictures import to_rgb
from eomt.data.sources import LabelDecoder, Sample

Transform = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class SegmentationDataset(Dataset):
    """Images with label maps: item i is `(image uint8 [3, H, W], labels uint8 [H, W])`.

    Label values are train indices 0..K-1, 255 for ignored pixels, or 254 for outliers, which belong to no class.

    Args:
        samples: Where each image and its label map are.
        classes: What the train indices mean.
        decode_labels: Turns a label picture (and its path, for errors) into train indices, uint8 [H, W].
        transform: Applied to (image, labels), for augmentation.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        classes: LabelSet,
        decode_labels: LabelDecoder,
        transform: Transform | None = None,
    ) -> None:
        self.samples = tuple(samples)
        self.classes = classes
        self.decode_labels = decode_labels
        self.transform = transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int | tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Item `index`; of a pair `(index, seed)`, the transform draws with that seed and disturbs nobody's.

        Raises:
            ValueError: A file cannot be decoded, or image and labels differ in size.
        """
        if isinstance(index, tuple):
            index, seed = index
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(seed)  # torch.manual_seed would reach out to the GPUs
                return self[index]
        image, labels = self.image(index), self.labels(index)
        if image.shape[1:] != labels.shape:
            raise ValueError(self.sizes_differ(index, image, labels))
        return self.transform(image, labels) if self.transform else (image, labels)

    def sizes_differ(self, index: int, image: Tensor, labels: Tensor) -> str:
        """The sentence on an image [3, H, W] and labels [H, W] of another size."""
        sample = self.samples[index]
        return (
            f"An image and its labels must have one size: {sample.image} is {_size(image[0])}, {sample.label} is "
            f"{_size(labels)} (height x width); export one of them again."
        )

    @property
    def names(self) -> list[str]:
        return [sample.name for sample in self.samples]

    @property
    def sequences(self) -> list[str | None]:
        """The video that each image is a frame of; None where the data set names none."""
        return [sample.sequence for sample in self.samples]

    def image(self, index: int) -> Tensor:
        """The image alone, uint8 [3, H, W], in memory pixel by pixel (channels last) as it was decoded.

        Raises:
            ValueError: it cannot be decoded, its pixels have no known range, or it is stored turned: its labels may
                have been drawn on either view.
        """
        source = self.samples[index].image
        picture = source.decode()
        refuse_turned(picture, str(source), "its labels")
        return pil_to_tensor(to_rgb(picture, str(source)))

    def labels(self, index: int) -> Tensor:
        """The label map alone, uint8 [H, W]; the image is not read.

        Raises:
            ValueError: it cannot be decoded, does not keep values as they were written, or has one of no class.
        """
        source = self.samples[index].label
        return torch.from_numpy(self.decode_labels(source.decode_mask(), str(source)))

    def with_transform(self, transform: Transform | None) -> "SegmentationDataset":
        return SegmentationDataset(self.samples, self.classes, self.decode_labels, transform)

    def fingerprint(self, hashing: bool = True) -> str | None:
        """Whether two runs saw the same files; see `eomt.data.identity.fingerprint`."""
        return fingerprint([(sample.name, (sample.image, sample.label)) for sample in self.samples], hashing)


def _size(plane: Tensor) -> str:
    return f"{plane.shape[0]}x{plane.shape[1]}"
