"""Trains a detector of morphed faces: a ViT pretrained by masking, with LoRA by default."""

import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import morph_checkout
from morph.arguments import CONFIG, add_overrides, count, overrides_in
from morph.settings import idle, read_overrides, read_settings

from eomt.command_line import quiet_libraries, reports_errors
from eomt.flags import script_parser
from eomt.settings.run import check_output_dir

OUTPUT_FLAGS = ("--output", "--resume auto")


@reports_errors()
def main(argv: Sequence[str] | None = None) -> None:
    """Checks the settings, trains and tests; prints the error rates."""
    parser = script_parser(__doc__)
    parser.add_argument("--config", default=CONFIG, help="a YAML file; see configs/")
    parser.add_argument("--output", type=Path, default=Path("outputs", "morph", time.strftime("%Y-%m-%d_%H-%M-%S")))
    parser.add_argument("--resume", help="a checkpoint to go on from, or auto: the newest one in the output folder")
    add_overrides(parser)
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    words = overrides_in(args)
    settings = read_settings(args.config, words, count)
    for name, owner in idle(settings, read_overrides(words)).items():
        logging.warning("override %s does nothing here: it belongs to %s", name, owner)
    settings.check_files()
    check_output_dir(args.output, args.resume, OUTPUT_FLAGS)

    quiet_libraries()
    from morph.metrics import metrics_table
    from morph.running import train

    summary = train(settings, args.output, args.resume)
    if "test" in summary:
        print(metrics_table(summary["test"]))
    model = args.output / "model"
    print(f"{model}: test it with python {morph_checkout.SRC / 'test.py'} --model_path {model}")


if __name__ == "__main__":
    sys.exit(main())
