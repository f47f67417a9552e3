"""The commands of docs/own_images.md run as they stand, but for the size of the network and the steps."""

import re
import shlex

import numpy as np
import pytest
from conftest import ROOT, TOY_MODEL, run_python
from PIL import Image

from eomt.files import read_json

PAGE = (ROOT / "docs" / "own_images.md").read_text()
BLOCKS = [block.replace("\\\n", " ") for block in re.findall(r"(?:^    .*\n)+", PAGE, re.M)]
COMMANDS = [shlex.split(line) for block in BLOCKS for line in block.splitlines() if line.strip().startswith("python ")]
TOY = {
    "--model vit_small": "--model tiny",
    "--img_size 512 512": "",
    "--img_size 256 256": "",
    "--batch_size 4": "--batch_size 2",
}
TOY = TOY | {"--epochs 80": "--epochs 1", "--epochs 12": "--epochs 1"}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with photos and masks as the page lays them out."""
    root = tmp_path_factory.mktemp("own")
    random = np.random.default_rng(0)
    for k in range(6):
        name = f"garden/{k}" if k % 2 else f"kitchen_{k:02d}"
        for part in ("photos", "masks"):
            (root / part / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (40, 60, 3), np.uint8)).save(root / "photos" / f"{name}.jpg")
        mask = np.repeat(np.repeat(np.array([[0, 1, 2], [5, 255, 0]], np.uint8), 20, 0), 20, 1)
        Image.fromarray(mask).save(root / "masks" / f"{name}.png")
    return root


def commands(script):
    return [words[2:] for words in COMMANDS if words[1] == script]


def test_the_page_has_a_baseline_and_lora_for_a_small_gpu_and_a_cpu():
    found = commands("train_with_lora.py")
    assert [("--use_lora" in words) for words in found] == [False, True, False, True]
    assert PAGE.count("\n", PAGE.index("```yaml"), PAGE.index("```\n\nThen")) - 1 <= 10


def test_the_class_file_of_the_page_is_one_that_is_read(tmp_path):
    from eomt.data.folder import read_classes

    (tmp_path / "classes.yaml").write_text(PAGE.split("```yaml\n")[1].split("```")[0])
    assert read_classes(tmp_path / "classes.yaml")[0].names == ("background", "table", "chair", "plant")


def test_a_class_file_is_written_and_both_kinds_of_run_train_with_it_at_once(home):
    init, report = commands("scripts/dataset_report.py")
    assert init[-2:] == [">", "classes.yaml"]
    written = run_python("scripts/dataset_report.py", *init[:-2], cwd=home)
    assert (written.returncode, written.stderr) == (0, "")
    (home / "classes.yaml").write_text(written.stdout)
    assert run_python("scripts/dataset_report.py", *report, "data.num_workers=0", cwd=home).returncode == 0
    for words in commands("train_with_lora.py")[2:]:  # those for a CPU; the others differ in numbers alone
        text = re.sub(r"every_n_epoch=\d+", "every_n_epoch=1", " ".join(words))
        for old, new in TOY.items():
            text = text.replace(old, new)
        run = run_python("train_with_lora.py", *text.split(), *TOY_MODEL, "data.num_workers=0", cwd=home)
        assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
        folder = home / words[words.index("--output_dir") + 1]
        assert read_json(folder / "summary.json")["steps"] == 2
        assert (folder / ("adapter" if "--use_lora" in words else "model")).is_dir()


def test_the_commands_for_a_gpu_say_what_those_for_a_cpu_say_but_for_numbers():
    gpu, cpu = commands("train_with_lora.py")[:2], commands("train_with_lora.py")[2:]
    for one, other in zip(gpu, cpu, strict=True):
        known = [word for word in other if word not in ("--precision", "32-true")]
        assert [re.sub(r"\d+|cpu_", "", word) for word in one] == [re.sub(r"\d+|cpu_", "", word) for word in known]


def test_the_job_of_the_page_is_one_that_is_accepted(home):
    (words,) = commands("scripts/launch_lightning.py")
    run = run_python("scripts/launch_lightning.py", "--dry-run", *words, cwd=home)
    assert run.returncode == 0, run.stderr
