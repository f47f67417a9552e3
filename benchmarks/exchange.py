"""Who reads whose files: what a network computes after it went through each kind of file, against the network itself.

python benchmarks/exchange.py RUN --images CAMVID/val benchmarks/exchange.json
python benchmarks/exchange.py dinov3 --images CAMVID/val benchmarks/exchange.json

RUN is a run's folder; `dinov3` a tiny network on DINOv3 with random weights. Differences are of the score of each class
for each pixel, in units of the largest value where that is above 1. A file keeps what it has of other networks.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.peer import published_dinov3
from eomt.data.listing import list_pictures
from eomt.exchange.deployed import ANY_BATCH, Deployed, class_scores, compare
from eomt.exchange.hf import write_hf
from eomt.exchange.onnx_export import CONVERSIONS, export_onnx
from eomt.exchange.onnx_scorer import OnnxScorer
from eomt.exchange.opening import open_merged
from eomt.exchange.torch_package import export_package
from eomt.files import read_json, write_json
from eomt.inference.prediction import read_image
from eomt.inference.windows import to_windows
from eomt.reporting.run_summary import provenance
from eomt.training.mask_classification_semantic import MaskClassificationSemantic

SEED, CROPS = 0, 8
DINOV3 = "dinov3"
TINY_DINOV3 = {
    "backbone_name": "vit_small_patch16_dinov3_qkvb",
    "backbone_kwargs": {"embed_dim": 48, "depth": 3, "num_heads": 3},
    "img_size": [64, 64],
    "num_classes": 11,
    "num_q": 20,
    "num_blocks": 2,
    "pretrained": False,
    "class_names": [f"class {k}" for k in range(11)],
}
Run = Callable[[Tensor], Sequence[Tensor]]  # images uint8 [B, 3, H, W] to class scores [B, K, H, W]


def main() -> None:
    """Measures one network and adds it to the file."""
    args = parse()
    facts = provenance([SEED])
    module = tiny_dinov3() if args.network == DINOV3 else open_merged(args.network)
    module.network.attn_mask_probs.zero_()  # as deployed: transformers would apply masks that have not faded
    crops = read_crops(args.images, tuple(module.hparams.img_size))
    rows = []
    with TemporaryDirectory() as folder:
        for file, reader, run in readers(module, crops, Path(folder)):
            found = compare(module, run, ANY_BATCH, crops)
            rows.append({"file": file, "reader": reader, "difference": found.difference, "same": found.same})
            print(f"{file:<24}{reader:<24}{found}", flush=True)
    facts |= {"crops": len(crops), "backbone": module.hparams.backbone_name, "rows": rows}
    parts = read_json(args.out, {"parts": {}})["parts"]
    name = "DINOv3, tiny, random" if args.network == DINOV3 else args.name
    write_json(args.out, {"what": __doc__.splitlines()[0], "parts": parts | {name: facts}})


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", help=f"a run's folder, or {DINOV3}")
    parser.add_argument("out", type=Path)
    parser.add_argument("--images", type=Path, required=True, help="a folder of pictures")
    parser.add_argument("--name", default="DINOv2 ViT-S/14, trained", help="of the network in the table (%(default)s)")
    return parser.parse_args()


def tiny_dinov3() -> MaskClassificationSemantic:
    """Random weights, far from where training begins, so that pixels have several classes."""
    torch.manual_seed(SEED)
    module = MaskClassificationSemantic(**TINY_DINOV3).eval()
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.copy_((2 if "class_head" in name else 0.2) * torch.randn(p.shape) + ("norm" in name and "weight" in name))
    return module


def read_crops(folder: Path, size: tuple[int, int]) -> Tensor:
    """The first window, uint8 [n, 3, h, w], of pictures spread over the folder."""
    pictures = list_pictures(folder).paths
    chosen = pictures[:: max(1, len(pictures) // CROPS)][:CROPS]
    return torch.stack([to_windows(read_image(path), size)[0][0] for path in chosen])


def readers(module: MaskClassificationSemantic, crops: Tensor, folder: Path) -> Iterator[tuple[str, str, Run]]:
    """Yields whose file, who reads it, and what it computes there."""
    rotary = "dinov3" in module.hparams.backbone_name
    module.save_pretrained(folder / "ours")
    yield "ours", "ours", Deployed(MaskClassificationSemantic.from_pretrained(folder / "ours").network)
    write_hf(module, folder / "hf")
    yield "transformers", "transformers", in_transformers(module, folder / "hf")
    back = open_merged(folder / "hf")
    yield "transformers", "ours", Deployed(back.network)
    state = load_file(folder / ("hf" if rotary else "ours") / "model.safetensors")
    torch.save(published_dinov3(state) if rotary else state, folder / "published.bin")
    published = MaskClassificationSemantic(**{**back.hparams, "ckpt_path": str(folder / "published.bin")}).eval()
    yield "published", "ours", Deployed(published.network)
    write_hf(published, folder / "hf_of_published")
    yield "published", "transformers", in_transformers(module, folder / "hf_of_published")
    for what, network in (("ours", module), ("published", published), ("transformers", back)):
        path = folder / f"{what}.onnx"
        export_onnx(network, path, crops)
        yield what, "ONNX fp32", OnnxScorer(path).run
    for precision in list(CONVERSIONS)[1:]:
        path = folder / f"{precision}.onnx"
        export_onnx(module, path, crops, precision=precision)
        yield "ours", f"ONNX {precision}", OnnxScorer(path).run
    export_package(module, folder / "ours.pt2", crops)
    yield "ours", "torch.export (pt2)", torch.export.load(folder / "ours.pt2").module()


def in_transformers(module: MaskClassificationSemantic, folder: Path) -> Run:
    """transformers' own network, which is given normalised pixels."""
    import transformers

    model = transformers.AutoModelForUniversalSegmentation.from_pretrained(folder).eval()
    encoder = module.network.encoder

    def run(images: Tensor) -> Sequence[Tensor]:
        found = model((images / 255 - encoder.pixel_mean) / encoder.pixel_std)
        return (class_scores(found.masks_queries_logits, found.class_queries_logits, tuple(images.shape[-2:])),)

    return torch.no_grad()(run)


if __name__ == "__main__":
    main()
