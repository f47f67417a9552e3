"""What a run of one step of the tiny network takes from start to end with many images, against a run with 8.

The images are small PNG files in one folder, their masks in another. The first step has ended when its line is logged;
what comes after it is the artefact and, the first time, the hashes. The first run of each kind finds no hashes of
earlier runs. Seconds of the processor are told beside those of the clock, which other work on the machine lengthens.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from eomt.files import write_json  # noqa: E402
from eomt.reporting.run_summary import git_commit, provenance  # noqa: E402

SEED = 0  # of the images; the runs' own is 0, too
FIRST_STEP = b"epoch 0, step 1: "  # the line that is logged after it where there is no terminal
STEP = "experiment=toy_source data=folder trainer.max_steps=1 trainer.limit_val_batches=0".split()
LOADER = ["data.batch_size=4", "data.num_workers=0"]
CLASSES = "classes:\n" + "".join(f"  - {{name: c{k}, color: [{k}, 0, 0], ids: [{k}]}}\n" for k in range(3))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--code", type=Path, default=ROOT, help="the checkout to measure, another version, say")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "startup_many.json")
    args = parser.parse_args()
    facts = provenance([SEED]) | {"git_commit": git_commit(args.code)}
    with tempfile.TemporaryDirectory() as folder:
        counts = (8, args.images)
        for count in counts:
            write_images(Path(folder) / str(count), count)
        runs = [measure(args.code, Path(folder), count) for _ in range(args.rounds) for count in counts]
    write_json(args.out, facts | {"runs": runs})
    print(args.out)
    return 0


def write_images(folder: Path, count: int) -> None:
    """Writes `images/`, `masks/` and `classes.yaml`; eight different pairs take turns."""
    rng = np.random.default_rng(SEED)
    for part, high, shape in (("images", 256, (64, 64, 3)), ("masks", 3, (64, 64))):
        (folder / part).mkdir(parents=True)
        for index in range(count):
            path = folder / part / f"street_{index:06d}.png"
            if index < 8:
                Image.fromarray(rng.integers(0, high, shape, dtype=np.uint8)).save(path)
            else:
                path.write_bytes((folder / part / f"street_{index % 8:06d}.png").read_bytes())
    (folder / "classes.yaml").write_text(CLASSES)


def measure(code: Path, folder: Path, count: int) -> dict[str, float]:
    """One run, in a process of its own."""
    data = folder / str(count)
    paths = [f"data.{part}={data / part}" for part in ("images", "masks")] + [f"data.classes={data}/classes.yaml"]
    output = f"output_dir={tempfile.mkdtemp(dir=folder)}/run"
    command = [sys.executable, str(code / "train_with_lora.py"), *STEP, *LOADER, *paths, output]
    environment = {**os.environ, "EOMT_CACHE": str(folder / "cache"), "CUDA_VISIBLE_DEVICES": ""}
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=code, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    printed = b""
    while FIRST_STEP not in printed and (part := os.read(process.stdout.fileno(), 4096)):
        printed += part
    first_step = time.perf_counter() - start
    resident = resident_mib(process.pid)
    printed += process.stdout.read()
    _, status, used = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if status or FIRST_STEP not in printed:
        raise RuntimeError(f"no first step was seen:\n{printed.decode()[-2000:]}")
    found = {
        "images": count,
        "seconds_to_first_step": round(first_step, 2),
        "mib_at_first_step": resident,
        "seconds": round(seconds, 2),
        "processor_seconds": round(used.ru_utime + used.ru_stime, 2),
        "peak_mib": used.ru_maxrss // 1024,
    }
    print(found, flush=True)
    return found


def resident_mib(process: int) -> int:
    """Resident set of a process."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") // 2**20


if __name__ == "__main__":
    sys.exit(main())
