"""Trains a deterministic VQA network: two encoders, each with or without LoRA,
and a decoder that writes the answer."""

import argparse
import logging
import re
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import vqa_checkout  # noqa: F401
from vqa_settings import DRAWN, add_flags, settle
from vqa_start import train

from eomt.command_line import quiet_libraries, reports_errors
from eomt.flags import script_parser

EXAMPLES = """examples, of python examples/vqa/train_no_latent.py:
  --start drawn --use_vision_lora --use_text_lora --unfreeze_decoder --lr 2e-3
  --config base --pretrained --train_csv train.csv --image_dir images \\
      --use_vision_lora --use_text_lora --unfreeze_decoder --early_stopping \\
      --answer_weights answer_weights.json
  --output_dir outputs/vqa/RUN --resume
  --ablate 8,16,32 --output_dir outputs/vqa/ranks
  --compare --seeds 0,1,2 --output_dir outputs/vqa/table

Leaves model/ (for eval_no_latent.py), summary.json, predictions.json,
metrics.csv and checkpoints/ in its folder."""


@reports_errors()
def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, or 1 with one sentence."""
    parser = script_parser(__doc__, EXAMPLES)
    add_flags(parser)
    parser.add_argument("--ablate", type=whole_numbers, metavar="8,16,32", help="one run for each rank, and a table")
    parser.add_argument("--compare", action="store_true", help="frozen, last 3 layers, LoRA of each part and of both")
    parser.add_argument("--seeds", type=whole_numbers, metavar="0,1,2", help="of --compare and --ablate (default: 0)")
    given = vars(parser.parse_args(argv))
    ranks, compare, seeds = (given.pop(name) for name in ("ablate", "compare", "seeds"))
    tables = bool(ranks or compare)
    if seeds and not tables:
        raise ValueError("--seeds belongs to --compare or --ablate: add one, or give --seed")
    if compare and ranks:
        raise ValueError("--compare and --ablate are two tables: give one of them")
    if tables and (given.get("resume") or "seed" in given):
        raise ValueError("--compare and --ablate go on by themselves and have --seeds: leave --resume and --seed out")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    quiet_libraries()
    logging.getLogger("httpx").setLevel(logging.WARNING)
    lora = {name: given.pop(name) for name in [*given] if re.match("(vision_|text_)?lora_", name)} if tables else {}
    weights = ("train_csv", "start", "pretrained", "vision_weights")
    if tables and not any(given.get(name) for name in weights):
        given["start"] = DRAWN
    if ranks and given.get("train_all"):
        raise ValueError("--ablate is of LoRA, and --train_all freezes nothing: give one of them")
    if ranks and not (given.get("use_vision_lora") or given.get("use_text_lora")):
        given |= {"use_vision_lora": True, "use_text_lora": True}
    settings = settle(given)
    folder = Path(settings.output_dir or f"outputs/vqa/{datetime.now():%Y-%m-%d_%H-%M-%S-%f}")
    if not tables:
        train(settings, folder)
        return 0
    from vqa_table import ablate_ranks, compare_variants

    if ranks:
        ablate_ranks(settings, folder, ranks, seeds or [0], lora)
    else:
        compare_variants(settings, folder, seeds or [0], lora)
    return 0


def whole_numbers(text: str) -> list[int]:
    """`8,16,32` as numbers."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of whole numbers such as 8,16,32") from None


if __name__ == "__main__":
    sys.exit(main())
