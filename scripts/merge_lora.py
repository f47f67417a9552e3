"""Merges a LoRA adapter into its base: a full network in a model/ folder, without LoRA, for whatever loads an EoMT.

Merging is done in float32. Before anything is written, mask and class logits of the merged network are compared with
those of the unmerged one, on crops of real images: those of the run's own validation data, or of --images.
"""

import argparse
import glob
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from _data import data_of_run, run_of

if TYPE_CHECKING:  # torch is imported late: --help answers at once
    from torch import Tensor

    from eomt.training.mask_classification_semantic import MaskClassificationSemantic

EXAMPLES = """examples:
  python scripts/merge_lora.py outputs/lora/adapter outputs/lora/model_merged
  python scripts/merge_lora.py adapter merged --images "photos/*.jpg" --ckpt_path /weights/eomt_large_640.bin

The two never agree to the last bit: merged, a layer computes (W + s B A) x; unmerged, W x + s B (A x). That is the same
number, rounded at other places, and float32 has 7 digits. Trained networks differ by some 1e-6 of the largest logit;
more than --tolerance means that something is wrong, and nothing is written."""
CROPS = 4


def main() -> int:
    """Exit code 0, or 1 with one sentence."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("adapter", metavar="ADAPTER", type=Path, help="an adapter/ folder, a LoRA run's folder, or its checkpoint")
    add("out", metavar="OUT", type=Path, help="folder to write; it must not hold anything yet")
    add("--images", nargs="+", help="images to compare on: a folder, or a pattern (default: the run's validation data)")
    add("--ckpt_path", metavar="BASE", help="the base weights, if they have moved")
    add("--tolerance", type=float, default=1e-4, help="largest difference, relative to the largest logit (%(default)s)")
    args = parser.parse_args()
    try:
        run(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def run(args: argparse.Namespace) -> None:
    """Opens, compares, merges and writes.

    Raises:
        ValueError, OSError: the adapter, the images or OUT are not what they should be, or the networks disagree.
    """
    if args.out.is_file() or (args.out.is_dir() and any(args.out.iterdir())):
        raise ValueError(f"{args.out} exists and is not empty: choose a new folder")
    from rich.console import Console
    from rich.progress import track

    from eomt.inference.artefacts import find_artefact, merge_adapter
    from eomt.lora.methods import update_norms
    from eomt.training.mask_classification_semantic import MaskClassificationSemantic

    adapter = find_artefact(args.adapter)
    module = MaskClassificationSemantic.from_pretrained(adapter, args.ckpt_path).float()
    if module.lora is None:
        raise ValueError(f"{adapter} is a whole network, not an adapter: there is nothing to merge")
    crops = read_crops(args.images, adapter, module.hparams.img_size)
    norms, quiet = update_norms(module.backbone), not sys.stderr.isatty()
    console = Console(stderr=True)
    before = [logits(module, crop) for crop in track(crops, "Unmerged", console=console, disable=quiet)]
    merge_adapter(module)
    after = [logits(module, crop) for crop in track(crops, "Merged", console=console, disable=quiet)]
    print(f"Merged {len(norms)} layers, norms of their updates {min(norms.values()):.3g} to {max(norms.values()):.3g}")
    for kind in ("mask", "class"):
        difference = largest_difference([crop[kind] for crop in before], [crop[kind] for crop in after])
        print(f"  {kind + ' logits':<13} differ by {difference:.1e} of the largest, on {len(crops)} crops")
        if not difference <= args.tolerance:
            raise ValueError(
                f"the {kind} logits differ by {difference:.1e} of the largest, more than --tolerance "
                f"{args.tolerance:g}: nothing was written"
            )
    module.save_pretrained(args.out)
    print(
        f"Before: {size(adapter):.1f} MB in {adapter}, beside its base\nAfter:  {size(args.out):.1f} MB in {args.out}"
    )
    print(
        f"Next:   python scripts/evaluate.py {args.out} data=NAME\n"
        f"        python train_with_lora.py variant=none model.ckpt_path={args.out}"
    )


def read_crops(images: Sequence[str] | None, adapter: Path, img_size: Sequence[int]) -> "list[Tensor]":
    """The first evaluation window, uint8 [3, h, w], of images spread over the given ones or the validation data.

    Raises:
        FileNotFoundError: there are no images.
    """
    from eomt.inference.prediction import read_image
    from eomt.inference.windows import to_windows

    if images:
        paths = find_images(images)
        chosen = [read_image(path) for path in spread(paths)]
    else:
        try:
            _, data = data_of_run(run_of(adapter))
        except (ValueError, OSError) as error:
            raise ValueError(f"the run's validation data cannot be read ({error}): give --images") from error
        chosen = [data.val_set.image(i) for i in spread(range(len(data.val_set)))]
    return [to_windows(image, tuple(img_size))[0][0] for image in chosen]


def spread(items: Sequence) -> list:
    return list(items[:: max(1, len(items) // CROPS)][:CROPS])


def find_images(patterns: Sequence[str]) -> list[Path]:
    """Pictures that a folder holds or a pattern names; FileNotFoundError if there are none."""
    from eomt.data.folder import PICTURES

    found = [p for name in patterns for p in ([*Path(name).rglob("*")] if Path(name).is_dir() else glob_paths(name))]
    pictures = sorted({path for path in found if path.suffix.lower() in PICTURES})
    if not pictures:
        raise FileNotFoundError(f"--images {' '.join(patterns)}: no pictures there ({', '.join(PICTURES)})")
    return pictures


def glob_paths(pattern: str) -> list[Path]:
    return [Path(name) for name in glob.glob(str(Path(pattern).expanduser()), recursive=True)]


def logits(module: "MaskClassificationSemantic", crop: "Tensor") -> "dict[str, Tensor]":
    """Logits of one crop, as deployed, in float32: `mask` [1, Q, h/4, w/4] and `class` [1, Q, K + 1]."""
    import torch

    with torch.no_grad(), module.network.deployed():
        (mask_logits,), (class_logits,) = module.network(crop[None] / 255)
    return {"mask": mask_logits, "class": class_logits}


def largest_difference(before: "Sequence[Tensor]", after: "Sequence[Tensor]") -> float:
    """Over all crops, relative to the largest logit."""
    import torch

    one, other = torch.cat(before), torch.cat(after)
    return ((one - other).abs().max() / one.abs().max()).item()


def size(path: Path) -> float:
    """Megabytes of a file, or of a folder's files."""
    return sum(file.stat().st_size for file in ([path] if path.is_file() else path.iterdir())) / 1e6


if __name__ == "__main__":
    sys.exit(main())
