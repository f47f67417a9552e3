"""What a network loses in fewer bits, and what it saves: mIoU, bytes, seconds an image, in torch and as ONNX files.

python benchmarks/quantised.py outputs/toy_source --name "toy streets"
python benchmarks/quantised.py outputs/camvid --name CamVid data.root=/data/camvid

Every variant predicts the validation images of the run's data, or of `data=NAME data.key=value`, one by one on the CPU,
windows and class map included; seconds are the median over images. An adapter is merged first. A file keeps the
networks that it has of other names. Nothing else should run meanwhile.
"""

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch import Tensor

from eomt.exchange.onnx_export import CONVERSIONS, export_onnx
from eomt.exchange.onnx_scorer import OnnxScorer
from eomt.exchange.opening import open_merged
from eomt.exchange.quantised import quantise, saved_bytes
from eomt.files import read_json, write_json
from eomt.indices import IGNORE, OUTLIER
from eomt.inference.crops import crops_or_drawings
from eomt.inference.prediction import Scorer, TorchScorer
from eomt.inference.saved import find_artefact, run_of
from eomt.reporting.run_summary import provenance
from eomt.settings.compose import data_for
from eomt.training.class_scores import scores_of
from eomt.training.mask_classification_semantic import MaskClassificationSemantic

Variant = tuple[str, Scorer, int]  # name, what predicts, bytes of its file


def main() -> None:
    """Measures one network and adds it to the file."""
    args = parse()
    about = provenance([0])  # before anything is written; what is drawn at random is the run's
    torch.set_num_threads(args.threads)
    module = open_merged(args.artefact, args.ckpt_path, args.backbone_weights)
    run = run_of(find_artefact(args.artefact))
    name, data = data_for(run, args.overrides, module.hparams.img_size)
    crops = torch.stack(crops_or_drawings([], run, module.hparams.img_size)[0])
    rows = []
    with TemporaryDirectory() as folder:
        for variant, score, size in variants(module, Path(folder), crops, args.threads):
            rows.append(
                {"variant": variant, "bytes": size, **measure(score, data.val_set, module.class_names, args.images)}
            )
            print(
                f"{variant:<18}{rows[-1]['miou']:.4f} mIoU {size / 2**20:9.2f} MiB {rows[-1]['seconds']:.3f} s",
                flush=True,
            )
    about |= {"data": name, "threads": args.threads, "img_size": list(module.hparams.img_size), "rows": rows}
    parts = read_json(args.out, {"parts": {}})["parts"]
    write_json(args.out, {"what": __doc__.splitlines()[0], "parts": parts | {args.name or name: about}})


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("artefact", type=Path, help="an adapter/ or model/ folder of a run")
    add("overrides", nargs="*", default=[], metavar="data.key=value")
    add("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    add("--name", help="of the network in the table (default: that of its data)")
    add("--images", type=int, help="as many of the validation images (default: all)")
    add("--threads", type=int, default=2)
    add("--ckpt_path")
    add("--backbone_weights")
    return parser.parse_intermixed_args()


def variants(module: MaskClassificationSemantic, folder: Path, crops: Tensor, threads: int) -> Iterator[Variant]:
    """Yields each variant as it is made: what waits takes no memory."""
    yield "torch fp32", TorchScorer(module.network), saved_bytes(module.network)
    for kind in ("weights", "dynamic"):
        network = copy.deepcopy(module.network)
        quantise(network, kind)
        yield f"torch int8-{kind}", TorchScorer(network), saved_bytes(network)
    for precision in CONVERSIONS:
        file = folder / f"{precision}.onnx"
        export_onnx(module, file, crops, precision=precision)
        yield f"onnx {precision}", OnnxScorer(file, threads=threads), file.stat().st_size


def measure(score: Scorer, images: Any, names: list[str], count: int | None) -> dict[str, Any]:
    """mIoU, and the seconds of each image, in a round after one image that is not timed."""
    classes, confusion, seconds = len(names), torch.zeros(len(names) ** 2, dtype=torch.long), []
    score([images[0][0]])
    for index in range(min(count or len(images), len(images))):
        image, labels = images[index]
        start = time.perf_counter()
        ((found, _),) = score([image])
        seconds.append(time.perf_counter() - start)
        seen = (labels != IGNORE) & (labels != OUTLIER)
        confusion += (labels[seen].long() * classes + found[seen].long()).bincount(minlength=classes**2)
    miou, by_class, _ = scores_of(confusion.view(classes, classes), names)
    return {"miou": miou, "class_iou": by_class, "seconds": statistics.median(seconds), "images": len(seconds)}


if __name__ == "__main__":
    main()
