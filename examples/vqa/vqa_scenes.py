"""Draws small scenes and asks about them in Vietnamese, of all four types; the same for the same seed."""

import csv
import random
import sys
from collections.abc import Sequence
from pathlib import Path

import vqa_checkout  # noqa: F401
from PIL import Image, ImageDraw

from eomt.command_line import reports_errors
from eomt.files import check_place, new_folder, read_json, write_json
from eomt.flags import script_parser

# what there is, and how often: unequal on purpose, as answers are in real data
SHAPES = {"hình tròn": 5, "hình vuông": 3, "hình tam giác": 2, "hình thoi": 1}
COLOURS = {"màu đỏ": 5, "màu xanh dương": 3, "màu xanh lá": 3, "màu vàng": 2, "màu tím": 1}
COUNTS = {"một": 5, "hai": 3, "ba": 2}
SLOTS = {"một": (0.5,), "hai": (0.17, 0.83), "ba": (0.17, 0.5, 0.83)}  # along a side: no place lies at two sides alone
PLACES = {"bên trái": 4, "bên phải": 3, "phía trên": 2, "phía dưới": 1}
RGB = {
    "màu đỏ": (214, 40, 40),
    "màu xanh dương": (38, 84, 214),
    "màu xanh lá": (44, 160, 60),
    "màu vàng": (240, 200, 40),
    "màu tím": (140, 60, 170),
}
ASKED = (  # by type: ways to ask
    ("đây là hình gì", "trong ảnh có hình gì", "vật trong ảnh là hình nào"),
    ("có bao nhiêu hình trong ảnh", "trong ảnh có mấy hình", "số lượng hình là bao nhiêu"),
    ("màu của hình là gì", "hình trong ảnh có màu gì", "các hình mang màu nào"),
    ("hình nằm ở đâu", "các hình ở phía nào của ảnh", "vị trí của hình là ở đâu"),
)
DOMAINS = {"day": (235, 240), "night": (15, 45)}  # how bright the ground is; at night colours are dim as well


def draw(answers: Sequence[str], size: int, domain: str, dice: random.Random) -> Image.Image:
    """A scene of which these are shape, number, colour and place."""
    shape, number, colour, place = answers
    ground = dice.randint(*DOMAINS[domain])
    dim = 1.0 if domain == "day" else dice.uniform(0.2, 0.4)
    picture = Image.new("RGB", (size, size), (ground, ground, min(ground + 10, 255)))
    paint = ImageDraw.Draw(picture)
    paint.fontmode = "L"
    for slot in SLOTS[number]:
        along = size * (slot + dice.uniform(-0.02, 0.02))
        near = size * dice.uniform(0.16, 0.19)
        x, y = (near, along) if place in ("bên trái", "bên phải") else (along, near)
        x, y = (size - x if place == "bên phải" else x), (size - y if place == "phía dưới" else y)
        tone = tuple(int(value * dim) + dice.randint(-8, 8) for value in RGB[colour])
        draw_shape(paint, shape, x, y, size * dice.uniform(0.12, 0.15), tone)
    return picture


def draw_shape(paint: ImageDraw.ImageDraw, shape: str, x: float, y: float, r: float, tone: tuple[int, ...]) -> None:
    """One shape around x, y."""
    if shape == "hình tròn":
        paint.ellipse((x - r, y - r, x + r, y + r), tone)
    elif shape == "hình vuông":
        paint.rectangle((x - r, y - r, x + r, y + r), tone)
    elif shape == "hình tam giác":
        paint.polygon([(x, y - r), (x + r, y + r), (x - r, y + r)], tone)
    else:
        paint.polygon([(x, y - r), (x + 0.7 * r, y), (x, y + r), (x - 0.7 * r, y)], tone)


def write_scenes(folder: Path, scenes: int, seed: int, size: int = 48, domain: str = "night") -> None:
    """Writes `questions.csv`, four questions a scene, and `images/`; the same that are there already stay.

    Raises:
        ValueError: there would be no scene, or the folder holds others.
    """
    if scenes < 1:
        raise ValueError(f"{scenes} scenes: at least 1 is needed")
    facts = {"scenes": scenes, "seed": seed, "size": size, "domain": domain}
    if folder.is_dir():
        if read_json(folder / "scenes.json", {}) != facts:
            raise ValueError(f"{folder} holds other scenes than {facts}: name a new folder")
        return
    dice = random.Random(f"{domain} {seed}")
    with new_folder(folder) as draft, (draft / "questions.csv").open("w", newline="", encoding="utf-8") as file:
        (draft / "images").mkdir()
        write_json(draft / "scenes.json", facts)
        rows = csv.writer(file)
        rows.writerow(("", "question", "answer", "img_id", "type"))
        for scene in range(scenes):
            answers = [dice.choices(list(kind), list(kind.values()))[0] for kind in (SHAPES, COUNTS, COLOURS, PLACES)]
            draw(answers, size, domain, dice).save(draft / "images" / f"{scene}.png")
            for kind, answer in enumerate(answers):
                rows.writerow((4 * scene + kind, dice.choice(ASKED[kind]), answer, scene, kind))


@reports_errors()
def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, or 1 with one sentence."""
    parser = script_parser(__doc__)
    parser.add_argument("folder", type=Path, help="to write to")
    parser.add_argument("--scenes", type=int, default=300, help="default: 300, with four questions each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, default=48, help="pixels of a side (default: 48)")
    parser.add_argument("--domain", choices=DOMAINS, default="night")
    args = parser.parse_args(argv)
    if args.folder.exists():
        raise ValueError(f"{args.folder} is there already: name a new folder")
    check_place(args.folder)
    write_scenes(args.folder, args.scenes, args.seed, args.size, args.domain)
    print(f"Wrote questions.csv and images/ to {args.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
