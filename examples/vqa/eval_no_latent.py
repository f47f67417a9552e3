"""Scores a trained VQA network, with its pictures and with blank ones. Its adapters carry their settings."""

import sys
from collections.abc import Sequence
from pathlib import Path

import vqa_checkout  # noqa: F401
from vqa_questions import find_pictures, read_questions

from eomt.command_line import quiet_libraries, reports_errors
from eomt.files import check_place, write_json
from eomt.flags import script_parser


@reports_errors()
def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, or 1 with one sentence."""
    parser = script_parser(__doc__)
    parser.add_argument("--model_path", type=Path, required=True, help="model/ of a run")
    parser.add_argument("--csv", type=Path, required=True, help="questions in ViVQA's form")
    parser.add_argument("--image_dir", type=Path, required=True, help="folder with their pictures")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--output", type=Path, help="JSON file for the scores")
    for part in ("vision", "text"):  # they need not be given, and must agree
        parser.add_argument(f"--{part}_lora_r", type=int, help="checked against the adapter")
        parser.add_argument(f"--{part}_lora_alpha", type=float, help="checked against the adapter")
        parser.add_argument(f"--{part}_lora_dropout", type=float, help="checked against the adapter")
    args = parser.parse_args(argv)
    if args.batch_size < 1:
        raise ValueError(f"--batch_size {args.batch_size}: it must be at least 1")
    if args.output:
        check_place(args.output, of_file=True)
    questions = read_questions(args.csv)
    find_pictures(questions, args.image_dir)
    quiet_libraries()
    import torch
    from vqa_data import Collate, Questions, loader
    from vqa_files import load_model
    from vqa_module import answer_all
    from vqa_scores import scores_by_type, table, type_accuracy, type_line

    flags = {name: value for name, value in vars(args).items() if "_lora_" in name}
    network, tokenizer = load_model(args.model_path, **flags)
    dataset = Questions(questions, args.image_dir, network.config.img_size)
    collate = Collate(tokenizer, network.language.config.max_position_embeddings - 1)
    network.to("cuda" if torch.cuda.is_available() else "cpu")
    rows = answer_all(network, tokenizer, loader(dataset, collate, args.batch_size))
    scores, told = scores_by_type(rows), type_accuracy(rows)
    print(f"{table(scores)}\n{type_line(told)}")
    if args.output:
        write_json(args.output, {name: score.as_dict() for name, score in scores.items()} | {"type_accuracy": told})
    return 0


if __name__ == "__main__":
    sys.exit(main())
