"""Measures how well a network tells what it has never seen: AuPRC, FPR95 and component metrics on anomaly benchmarks.

The network runs once over every image; all scores and temperatures come from its logits, which stay on disk.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import _checkout  # noqa: F401

from eomt.anomaly.request import choose_benchmarks, parse, variant_to_export
from eomt.anomaly.scores import variants
from eomt.command_line import quiet_libraries, reports_errors
from eomt.files import check_place
from eomt.flags import add_output_dir, script_parser, script_words
from eomt.inference.saved import check_artefact, results_of

EXAMPLES = """examples:
  python scripts/evaluate_anomaly.py outputs/rba/adapter data=toy_anomalies       # draws its images
  python scripts/evaluate_anomaly.py outputs/rba/adapter data.root=/data/anomaly  # every benchmark that lies there
  python scripts/evaluate_anomaly.py outputs/rba/model data=road_anomaly_21 data.root=/data/anomaly \\
      scores=[msp,max_logit,max_entropy,rba] temperatures=[0.5,0.75,1.0,1.1]
  python scripts/evaluate_anomaly.py outputs/rba/model data=fs_static data.root=/data/anomaly --export rba --method Ours

settings:
  data          road_anomaly_21, road_obstacle_21, fs_lost_and_found, fs_static, road_anomaly, toy_anomalies; or a list
  data.root     folder of the benchmarks' folders
  data.number, data.size, data.seed   of toy anomalies (60, [128,256], 0)
  scores        msp, max_logit, max_entropy, rba, msp_class_t (default: the first four)
  temperatures  of the scores that have one (default: [1.0])"""


@reports_errors()
def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, or 1 with one sentence."""
    args = parse_arguments(argv)
    settings = parse(args.settings)
    asked = variants(settings["scores"], settings["temperatures"])
    exported = variant_to_export(args.export, asked)
    choose_benchmarks(settings)
    check_artefact(args.model)
    for folder in (args.output_dir, args.cache):
        if folder:
            check_place(folder)

    from eomt.reporting.anomaly_report import Options, evaluate_benchmarks

    quiet_libraries()
    options = Options(
        output=args.output_dir or results_of(args.model, "anomaly"),
        cache=args.cache,
        precision=args.precision,
        device=args.device,
        components=not args.no_components,
        pictures=args.pictures,
        export=exported,
        method=args.method,
    )
    evaluate_benchmarks(args.model, settings, asked, options, args.ckpt_path, args.backbone_weights)
    return 0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = script_parser(__doc__, EXAMPLES, usage="%(prog)s MODEL [KEY=VALUE ...] [options]")
    add = parser.add_argument
    add("model", metavar="MODEL", type=Path, help="an adapter/ or model/ folder, a run's folder, or a checkpoint")
    add("settings", nargs="*", default=[], metavar="KEY=VALUE", help="see below")
    add("--precision", choices=("32-true", "bf16-mixed", "16-mixed"), help="default: that of the run")
    add("--ckpt_path", help="the base weights of an adapter, if they have moved")
    add("--backbone_weights", help="the same for an adapter on a plain backbone from a file")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: a GPU if there is one)")
    add("--cache", type=Path, help="folder of the logits; default: anomaly/logits in the run's folder")
    add("--no_components", action="store_true", help="pixel metrics alone, in half the time")
    add("--pictures", type=int, default=4, metavar="N", help="images to draw (default: %(default)s; 0: none)")
    add("--export", metavar="SCORE", help="also write this score's maps as the SegmentMeIfYouCan benchmark reads them")
    add("--method", default="EoMT-LoRA", help="the method's name in that export (default: %(default)s)")
    add_output_dir(parser, "folder for the results; default: anomaly/ in the run's folder, or one in there")
    return parser.parse_intermixed_args(script_words(argv))


if __name__ == "__main__":
    sys.exit(main())
