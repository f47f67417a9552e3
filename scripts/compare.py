"""With or without LoRA? A matrix of fair runs, and one report about it.

`run` trains every variant with every seed from the same weights, on the same crops in the same order, for the same
number of steps, and evaluates what the last step left. Run the same command again to continue an interrupted matrix.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import _checkout  # noqa: F401

from eomt.command_line import reports_errors
from eomt.comparison.evaluations import evaluate_run, report_runs
from eomt.comparison.matrix import VARIANTS, run_matrix
from eomt.comparison.watch import watch
from eomt.flags import add_output_dir, help_style, script_parser, script_words
from eomt.processes import Interrupted, Interruption
from train_with_lora import check_composed

EXAMPLES = f"""examples:
  python scripts/compare.py run experiment=toy_night "variants=[none,head,lora_r8,full]" "seeds=[0,1,2]"
  python scripts/compare.py run experiment=camvid_dusk "variants=[none,lora_r8,full]" "seeds=[0,1,2]" \\
      data.root=/data/camvid source="experiment=camvid_day data.root=/data/camvid" output_dir=outputs/compare/dusk
  python scripts/compare.py run --config-name cityscapes data.root=/data/cityscapes "devices=[0,1,2,3]" \\
      "variants=[lora_r16,full]" "seeds=[0,1,2]" hydra/launcher=joblib        # one run on each of four GPUs
  python scripts/compare.py run experiment=toy_anomalies "variants=[baseline,rba,arcface,arcface_rba]" \\
      "anomaly=[toy_anomalies]"
  python scripts/compare.py report outputs/compare/dusk --baseline full
  python scripts/compare.py watch outputs/compare/dusk                   # while it runs

variants: {", ".join(VARIANTS)} (configs/variant/)"""
RUN_HELP = """variants=[...]   what trains (default: none, head, lora_r8, lora_r16, full)
seeds=[...]      default: 0
images=[...]     numbers of training images, as in images=[16,64,all]: fewer are a part of more (default: all)
tune="..."       settings to choose for each variant, as in tune="model.lr=[1e-4,3e-4,1e-3] model.lora_lr=[1e-3,3e-3]",
                 by trials of half the steps on a fifth of the training images, held out; then all seeds run with them;
                 the same command with some of its variants and further values tries those, too
source="..."     the data that the start weights come from, to measure what is forgotten:
                 "experiment=NAME data.root=..." or "data=NAME data.key=value ..."
anomaly=[...]    anomaly benchmarks to score every network on: toy_anomalies, road_anomaly_21, ...
anomaly_root=... folder that holds those benchmarks; toy_anomalies need none
devices=[...]    GPUs to share out; with hydra/launcher=joblib one run on each at a time
output_dir=...   the matrix's folder (default: outputs/compare/EXPERIMENT); it holds VARIANT/seed_N/
hydra/launcher=  joblib or submitit_slurm (extra: launchers); default: one run after another
anything else    is passed to train_with_lora.py: experiment=NAME, data.root=..., trainer.max_epochs=..."""


@reports_errors()
def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0; 1 with one sentence, or when a cell failed; 128 + its number after a signal."""
    args = parse(argv)
    try:
        if args.command == "run":
            with Interruption():
                return run_matrix(args.overrides, args.config_name, check_composed)
        if args.command == "watch":
            watch(args.matrix, args.port, args.baseline, args.score)
        if args.command == "evaluate":
            evaluate_run(args.run, args.source)
            return 0
        output = args.output_dir or args.runs[0] / "report"
        report_runs(args.runs, output, args.baseline, args.score, args.allow_different, args.costs)
        return 0
    except Interrupted as stopped:
        print(f"{stopped}: the same command goes on from here", file=sys.stderr)
        return stopped.code


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line: `run`, `report` or `evaluate`, with what belongs to it."""
    parser = script_parser(__doc__, EXAMPLES)
    parser.own_settings = re.findall(r"^(\w+)=", RUN_HELP, re.MULTILINE)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="train and evaluate a matrix", **help_style(RUN_HELP))
    run.add_argument("overrides", nargs="*", metavar="key=value")
    run.add_argument("--config-name", default="cityscapes", help="of train_with_lora.py (default: %(default)s)")
    formats = "one table, plots and pictures: HTML, Markdown, CSV, LaTeX"
    report = commands.add_parser("report", help=formats, **help_style())
    report.add_argument("runs", nargs="+", type=Path, help="matrix folders, or folders of single runs")
    report.add_argument("--baseline", help="the variant that others are compared to (default: full or baseline)")
    report.add_argument("--score", help="of anomalies, one for the whole table (default: rba)")
    add_output_dir(report, "default: report/ in the first folder")
    report.add_argument(
        "--costs", type=Path, metavar="FOLDER", help="take seconds and memory from the runs in it, measured undisturbed"
    )
    report.add_argument("--allow-different", action="store_true", help="mark runs that differ instead of stopping")
    what = "the report of a running matrix, in a browser of this machine"
    watching = commands.add_parser("watch", help=what, **help_style())
    watching.add_argument("matrix", type=Path, help="its output_dir")
    watching.add_argument("--port", type=int, default=8642, help="of 127.0.0.1; 0: any free one (default: %(default)s)")
    watching.add_argument("--baseline", help="as for report")
    watching.add_argument("--score", help="as for report")
    what = "evaluate a run for the report (run and report do it as needed)"
    evaluate = commands.add_parser("evaluate", help=what, **help_style())
    evaluate.add_argument("run", type=Path)
    evaluate.add_argument("source", nargs="*", metavar="key=value", help="the source domain, as in source= above")
    return parser.parse_args(options_first(sys.argv[1:] if argv is None else argv))


def options_first(words: Sequence[str]) -> list[str]:
    """`--config-name` may stand behind overrides, as for train_with_lora.py; argparse wants it in front of them."""
    words = list(words)
    for i, word in enumerate(words):
        if words[0] == "run" and word.startswith("--config-name"):
            option = words[i : i + 1 if "=" in word else i + 2]
            return ["run", *option, *words[1:i], *words[i + len(option) :]]
    return words if words[:1] == ["run"] else script_words(words)  # those of a run are the training's


if __name__ == "__main__":
    sys.exit(main())
