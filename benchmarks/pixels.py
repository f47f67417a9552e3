"""The share of values at 0 or 255 in training images, as they are and as if they had been normalised and saved.

EOMT_CAMVID=FOLDER python benchmarks/pixels.py benchmarks/pixels.json
"""

import os
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.peer import MEAN, STD
from eomt.data.camvid import camvid
from eomt.data.dataset import SegmentationDataset
from eomt.data.toy_streets import toy_streets
from eomt.diagnosis.pixels import share_clipped
from eomt.files import write_json
from eomt.reporting.run_summary import provenance

SIZE = {"img_size": (128, 256), "num_workers": 0}  # of crops, which nobody draws here


def saved_normalised(image: Tensor) -> Tensor:
    """An image uint8 [3, H, W] that was normalised and then cut off at 0 and 255, as saving does."""
    mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in (MEAN, STD))
    return (((image / 255 - mean) / std).clamp(0, 1) * 255).byte()


def shares(dataset: SegmentationDataset) -> dict[str, float]:
    """Shares over all of its images: averages, the largest as they are, the smallest as if normalised."""
    images = [dataset.image(index) for index in range(len(dataset))]
    plain, cut = ([share_clipped(of(image)) for image in images] for of in (Tensor.clone, saved_normalised))
    average = {"average": sum(plain) / len(plain), "average_normalised": sum(cut) / len(cut)}
    return {"images": len(images), "largest": max(plain), "smallest_normalised": min(cut)} | average


def main() -> None:
    """Writes the shares as JSON."""
    facts = {"what": __doc__.splitlines()[0]} | provenance([0])
    sets = {
        "CamVid, training": camvid(os.environ["EOMT_CAMVID"], **SIZE),
        "toy streets, clear": toy_streets(domain="clear", **SIZE),
        "toy streets, night and fog": toy_streets(domain="night_fog", **SIZE),
    }
    facts["data"] = {name: shares(data.train_set) for name, data in sets.items()}
    write_json(sys.argv[1], facts)


if __name__ == "__main__":
    main()
