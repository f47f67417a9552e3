"""Mistakes are answered before the heavy libraries are imported: modules are counted, not seconds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "torchvision", "timm", "lightning", "peft", "torchmetrics", "matplotlib")
REPORT = f"""
import atexit, runpy, sys
atexit.register(lambda: print("imported:", sorted(set({HEAVY!r}) & set(sys.modules))))
sys.argv = sys.argv[1:]
sys.path.insert(0, "scripts")
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def imported_by(*words):
    """Exit code, error and heavy libraries of a command line."""
    result = subprocess.run([sys.executable, "-c", REPORT, *words], cwd=ROOT, capture_output=True, text=True)
    return result.returncode, result.stderr, result.stdout.splitlines()[-1]


LORA = ("--config-name", "cityscapes_lora")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ((*LORA, "data.root=/nowhere"), "Cityscapes needs /nowhere/leftImg8bit_trainvaltest.zip"),
        (LORA, "data.root is required"),
        (("experiment=toy_source", "model.use_lora=true", "model.lora_rank=0"), "LoRA rank 0"),
        ((*LORA, "data.root=/tmp", "model.lora_dropout=1.5"), "LoRA dropout 1.5"),
        (("--img_size", "100", "100", "--use_lora"), "try [96, 96]"),
        ((*LORA, "data.root=/tmp", "model.ckpt_path=/nowhere/x.ckpt"), "ckpt_path /nowhere/x.ckpt"),
        (("experiment=toy_source", "resume=/nowhere/last.ckpt"), "resume /nowhere/last.ckpt"),
        (("experiment=toy_source", "model.lora_rank=many"), "model.lora_rank 'many'"),
        (
            ("data=folder", "data.images=/nowhere", "data.masks=/nowhere", "data.classes=/nowhere"),
            "/nowhere is not there",
        ),
    ],
)
def test_a_mistake_in_a_run_is_answered_without_the_libraries_that_train(words, sentence, tmp_path):
    code, error, imported = imported_by("train_with_lora.py", *words, f"hydra.run.dir={tmp_path / 'run'}")
    assert code == 1 and sentence in error and "Traceback" not in error
    assert imported == "imported: []"


def test_an_occupied_folder_is_answered_without_the_libraries_that_train(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,train/loss\n")
    code, error, imported = imported_by("train_with_lora.py", "experiment=toy_source", f"output_dir={tmp_path}")
    assert code == 1 and "holds a run: continue it with resume=auto, or choose another folder" in error
    assert imported == "imported: []"
    assert (tmp_path / "metrics.csv").read_text() == "step,train/loss\n"


def test_a_second_call_in_one_process_finds_the_environment_as_the_first_one_did(monkeypatch, capsys, tmp_path):
    import train_with_lora

    monkeypatch.chdir(tmp_path)
    for setting in (None, "0"):
        monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
        if setting is not None:
            monkeypatch.setenv("HYDRA_FULL_ERROR", setting)
        before, words = dict(os.environ), list(sys.argv)
        assert train_with_lora.main(["experiment=toy_source", "model.lora_rnk=4"]) == 2
        assert "did you mean lora_rank" in capsys.readouterr().err
        assert train_with_lora.main(["experiment=toy_source", "model.llrd=2.0"]) == 1
        assert "llrd 2.0" in capsys.readouterr().err
        assert dict(os.environ) == before and sys.argv == words


@pytest.fixture
def place(tmp_path):
    """A folder with a saved network's settings, a run's configuration on data that are gone, and an image."""
    (tmp_path / "model").mkdir()
    settings = {"use_lora": False, "img_size": [64, 64], "num_classes": 3}
    (tmp_path / "model" / "eomt_config.json").write_text(json.dumps({"init": settings}))
    Image.new("RGB", (8, 8)).save(tmp_path / "image.png")
    (tmp_path / "config.yaml").write_text(
        "data: {_target_: eomt.data.camvid.camvid, root: /nowhere, img_size: [64, 64], batch_size: 1}\n"
    )
    return tmp_path


MISTAKES = [  # script, its arguments, exit code and a part of the sentence
    ("compare.py", "run experiment=toy_source variants=[hed]", 1, "variant hed is not in configs/variant"),
    ("compare.py", "run experiment=toy_source variants=[full] model.lr=-1", 1, "lr -1"),
    ("compare.py", "run experiment=camvid_day variants=[full] data.root=/nowhere", 1, "/nowhere"),
    ("compare.py", "report /nowhere", 1, "/nowhere"),
    ("compare.py", "evaluate /nowhere", 1, "/nowhere has no summary.json"),
    ("convert.py", "/nowhere {}/out --to eomt", 1, "no such file"),
    ("cost.py", "model=vit_largest", 1, "vit_largest"),
    ("cost.py", "--memory=0", 1, "--memory 0: must be greater than 0"),
    ("cost.py", "model.lora_rank=many", 1, "model.lora_rank 'many'"),
    ("cost.py", "model.img_size=[60,64]", 1, "try [64, 64]"),
    ("dataset_report.py", "data=camvid data.root=/nowhere", 2, "/nowhere"),
    ("dataset_report.py", "--init /nowhere {}", 2, "/nowhere: no such folder (check data.images)"),
    ("demo.py", "--output {}/demo trainer.max_epochs=many", 1, "trainer.max_epochs 'many'"),
    ("doctor.py", "/nowhere", 2, "no such file or folder"),
    ("doctor.py", "{} --ckpt_path /nowhere", 2, "ckpt_path /nowhere: no such file or folder"),
    ("doctor.py", "{}/model data=camvid data.root=/nowhere", 2, "/nowhere"),
    ("evaluate.py", "/nowhere", 1, "no such file or folder"),
    ("evaluate.py", "{}/model", 1, "/nowhere"),
    ("evaluate.py", "{}/model data=camvid data.root=/nowhere", 1, "/nowhere"),
    ("evaluate.py", "{}/model data=camvit", 1, "data=camvit is not a dataset"),
    ("evaluate.py", "{}/model trainer.precision=32", 1, "only the data can be chosen here"),
    ("evaluate.py", "{}/model data=toy_streets data.img_size=[32,32]", 1, "the model, which carries img_size=[64, 64]"),
    ("evaluate_anomaly.py", "/nowhere data=toy_anomalies data.root={}/toys data.number=1", 1, "no such file or folder"),
    ("evaluate_anomaly.py", "{}/model data.nmber=4", 1, "did you mean data.number?"),
    ("evaluate_anomaly.py", "{}/model data=toy_anomaly data.root={}", 1, "did you mean toy_anomalies?"),
    ("evaluate_anomaly.py", "{}/model data=fs_static data.root=/nowhere", 1, "FS Static needs /nowhere"),
    ("evaluate_anomaly.py", "{}/model data=toy_anomalies scores=[mps]", 1, "did you mean msp?"),
    ("evaluate_anomaly.py", "{}/model data=toy_anomalies --export energy", 1, "--export energy"),
    ("extract_lora.py", "/nowhere timm {}/out", 1, "no such file or folder"),
    ("extract_lora.py", "{}/model /nowhere {}/out", 1, "/nowhere: no such file or folder; timm means"),
    ("extract_lora.py", "{}/model timm {}/out --rank 0", 1, "rank 0: at least 1"),
    ("extract_lora.py", "{}/model timm {}", 1, "is not empty"),
    ("extract_lora.py", "{}/model timm {}/out", 1, "/nowhere"),
    ("import_masks.py", "/nowhere.json {} {}/out", 1, "/nowhere.json: no such file"),
    ("import_masks.py", "{}/image.png {}/config.yaml {}/config.yaml", 1, "is a file: name a folder"),
    ("inspect_model.py", "/nowhere", 1, "no such file or folder"),
    ("inspect_model.py", "{}/model --base /nowhere", 1, "no such file or folder"),
    ("launch_lightning.py", "--machine L4 -- --lora_rnk 8", 2, "did you mean --lora_rank?"),
    ("launch_lightning.py", "--machine L4 -- experiment=toy_source model.lora_rnk=8", 2, "did you mean lora_rank?"),
    ("launch_lightning.py", "--machine L4 -- --multirun seed=0,1", 1, "a job is one run"),
    ("make_cut_paste.py", "--out {} data=toy_streets", 1, "is there already"),
    ("make_cut_paste.py", "--out {}/out data=cityscapes data.root=/nowhere data/cut_paste=toy", 1, "/nowhere"),
    ("merge_lora.py", "/nowhere {}/out", 1, "no such file or folder"),
    ("merge_lora.py", "{}/model {}", 1, "exists and is not empty"),
    ("merge_lora.py", "{}/model {}/out --images /nowhere*", 1, "no pictures there"),
    ("merge_lora.py", "{}/model {}/out", 1, "give --images"),
    ("merge_lora.py", "{}/model {}/out --images {}/image.png", 1, "is a whole network, not an adapter"),
    ("predict.py", "{}/model /nowhere {}/out", 1, "/nowhere"),
    ("predict.py", "/nowhere {}/image.png {}/out", 1, "no such file or folder"),
    ("publish.py", "/nowhere user/name --dry-run", 1, "no such file or folder"),
    ("publish.py", "{}/model name --dry-run", 1, "user/name is meant"),
    ("publish.py", "{}/model user/name --dry-run --base /nowhere", 1, "hf://user/name@revision/file"),
    ("publish.py", "{}/model user/name --dry-run --picture /nowhere.png", 1, "/nowhere.png"),
]


def test_every_script_makes_a_mistake_here():
    scripts = {path.name for path in (ROOT / "scripts").glob("[!_]*.py")}
    assert scripts == {script for script, *_ in MISTAKES}


@pytest.mark.parametrize(("script", "words", "code", "sentence"), MISTAKES)
def test_a_mistake_of_a_script_is_answered_without_the_libraries_that_compute(script, words, code, sentence, place):
    found, error, imported = imported_by(f"scripts/{script}", *words.replace("{}", str(place)).split())
    assert (found, imported) == (code, "imported: []"), error
    assert sentence in error and "Traceback" not in error
    assert error.startswith("error: ") and error.count("\n") == 1
