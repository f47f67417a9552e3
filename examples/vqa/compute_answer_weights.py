"""Writes weights of answers for the loss: rare ones count more, so that the common ones are not all that is learned."""

import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import vqa_checkout  # noqa: F401
from vqa_questions import plain, read_questions

from eomt.command_line import reports_errors
from eomt.files import check_place, read_json, write_json
from eomt.flags import script_parser


def compute_answer_weights(answers: Iterable[str], smoothing: float = 0.1) -> dict[str, float]:
    """1 / (share + smoothing) of each answer, scaled so that the mean over all questions is 1."""
    counts = Counter(answers)
    total = counts.total()
    raw = {answer: 1 / (count / total + smoothing) for answer, count in counts.items()}
    mean = sum(raw[answer] * count for answer, count in counts.items()) / total
    return {answer: weight / mean for answer, weight in raw.items()}


def read_answer_weights(path: str | Path) -> dict[str, float]:
    """The weights of a file that this script wrote.

    Raises:
        ValueError: there are none in it, or one is not above 0. FileNotFoundError: there is no file.
    """
    weights = read_json(path).get("answer_to_weight")
    if not isinstance(weights, dict) or not weights:
        raise ValueError(f"{path} has no answer_to_weight: write it with compute_answer_weights.py")
    for answer, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < float("inf"):
            raise ValueError(f"{path}: the weight of {answer!r} is {weight!r}: it must be above 0")
    return {plain(answer): float(weight) for answer, weight in weights.items()}


@reports_errors()
def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, or 1 with one sentence."""
    parser = script_parser(__doc__)
    parser.add_argument("--train_csv", type=Path, required=True, help="in ViVQA's form")
    parser.add_argument("--output", type=Path, default=Path("answer_weights.json"), help="default: %(default)s")
    parser.add_argument(
        "--smoothing", type=float, default=0.1, help="added to each answer's share (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    if not 0 < args.smoothing < float("inf"):
        raise ValueError(f"--smoothing {args.smoothing:g}: it must be above 0, for example 0.1")
    check_place(args.output, of_file=True)
    answers = [question.answer for question in read_questions(args.train_csv)]
    weights = compute_answer_weights(answers, args.smoothing)
    write_json(args.output, {"answer_to_weight": weights, "smoothing": args.smoothing, "questions": len(answers)})
    for answer, count in Counter(answers).most_common(20):
        print(f"{answer}: {count} ({100 * count / len(answers):.1f} %), weight {weights[answer]:.2f}")
    print(f"Wrote the weights of {len(weights)} answers to {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
