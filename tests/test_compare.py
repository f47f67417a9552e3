"""A matrix of runs, started the way a user starts it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from zipfile import is_zipfile

import numpy as np
import pytest
import warm
from conftest import TOY_DATA
from conftest import TOY_MODEL as TINY
from filelock import FileLock
from PIL import Image

from eomt.comparison.matrix import check_matrix, parse_matrix
from eomt.files import in_use
from eomt.training.run_folder import newest_checkpoint, steps_in
from train_with_lora import check_composed

ROOT = Path(__file__).parent.parent
DATA = TOY_DATA[1:]  # the experiment names the data set
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def compare(*arguments, code=0):
    command = [warm.python(), str(ROOT / "scripts" / "compare.py"), *map(str, arguments)]
    result = subprocess.run(
        command, capture_output=True, text=True, stdin=subprocess.DEVNULL, env=ENVIRONMENT, timeout=1200
    )
    assert result.returncode == code, result.stdout[-3000:] + result.stderr[-3000:]
    return result


def read(path):
    return json.loads(Path(path).read_text())


@pytest.fixture(scope="module")
def settings(toy_cache, toy_run):
    """The overrides of every matrix here."""
    start = [f"model.ckpt_path={toy_run[0]}/model", "data.batch_size=4", "trainer.max_epochs=2"]
    return ["experiment=toy_night", *DATA, f"data.root={toy_cache}", *TINY, *start]


@pytest.fixture(scope="module")
def matrix(settings, toy_cache, tmp_path_factory):
    folder = tmp_path_factory.mktemp("matrix") / "of runs"  # a space in the path, too
    source = f"source=experiment=toy_source data.root={toy_cache} {' '.join(DATA)}"
    arguments = ["run", *settings, "variants=[none,lora_r4,full]", "seeds=[3]", f"output_dir='{folder}'", source]
    return folder, arguments, compare(*arguments)


def test_every_cell_is_a_whole_run_in_one_folder_with_its_evaluation(matrix):
    folder, _, result = matrix
    assert "3 of 3 cells finished" in result.stdout
    for variant in ("none", "lora_r4", "full"):
        run = folder / variant / "seed_3"
        assert read(run / "cell.json")["status"] == "finished"
        summary = read(run / "summary.json")
        assert summary["seed"] == 3 and summary["machine"]["processor"]
        assert datetime.fromisoformat(summary["finished_at"]).tzinfo is not None
        counts = np.load(run / "evaluation" / "target.npz")["confusion"]
        assert counts.shape == (3, 19, 19) and counts.sum() > 0
        sequences = read(run / "evaluation" / "target.json")["sequences"]
        assert sequences == [None] * 3, "a place for each image; drawn scenes are of no drive"
        assert read(run / "evaluation" / "source.json")["domain"] == "source"


def test_cells_of_one_seed_start_from_the_same_weights_and_see_the_same_crops(matrix):
    summaries = {v: read(matrix[0] / v / "seed_3" / "summary.json") for v in ("none", "lora_r4", "full")}
    assert len({summary["start_fingerprint"] for summary in summaries.values()}) == 1
    assert summaries["lora_r4"]["batches"] == summaries["full"]["batches"] is not None
    assert summaries["lora_r4"]["steps"] == summaries["full"]["steps"] == 4 and summaries["none"]["steps"] == 0
    assert summaries["lora_r4"]["flops_per_step"] > 0
    assert all(summary["kept"] == "last" for summary in summaries.values())


def test_the_evaluation_finds_the_score_that_training_reported(matrix):
    for variant in ("none", "lora_r4", "full"):
        run = matrix[0] / variant / "seed_3"
        assert read(run / "evaluation" / "target.json")["miou"] == pytest.approx(
            read(run / "summary.json")["last_miou"], abs=1e-6
        )


def test_an_artefact_that_does_not_score_what_its_run_reported_is_refused(matrix, tmp_path):
    run = tmp_path / "run"
    run.symlink_to(matrix[0] / "none" / "seed_3")
    summary = read(run / "summary.json")
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("model", "config.yaml"):
        (copy / name).symlink_to(run / name)
    (copy / "summary.json").write_text(json.dumps(summary | {"miou": summary["miou"] + 1e-3}))
    assert "but its run reported" in compare("evaluate", copy, code=1).stderr


def test_the_same_command_again_keeps_what_is_finished_and_adds_what_is_new(matrix):
    folder, arguments, _ = matrix
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/*/summary.json")}
    more = [word.replace("variants=[none,lora_r4,full]", "variants=[head]") for word in arguments]
    result = compare(*more)
    assert result.stdout.count("finished before, kept") == 3 and "4 of 4 cells finished" in result.stdout
    assert all(path.stat().st_mtime_ns == then for path, then in before.items())
    assert read(folder / "matrix.json")["variants"] == ["none", "lora_r4", "full", "head"]


def anomalies(folder, *variants):
    return [folder / variant / "seed_3" / "anomaly" / "toy_anomalies.json" for variant in variants]


@pytest.fixture(scope="module")
def scored(matrix, toy_cache, tmp_path_factory):
    """Two finished cells, which toy anomalies were added to afterwards, and the arguments of their matrix."""
    folder = tmp_path_factory.mktemp("scored")
    for variant in ("none", "lora_r4"):
        shutil.copytree(matrix[0] / variant, folder / variant)
    facts = read(matrix[0] / "matrix.json") | {"variants": ["none", "lora_r4"]}
    (folder / "matrix.json").write_text(json.dumps(facts))
    arguments = [
        *(word for word in matrix[1] if not word.startswith(("variants", "output_dir"))),
        f"output_dir={folder}",
    ]
    arguments.append("variants=[none,lora_r4]")
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/*/summary.json")}
    ENVIRONMENT["EOMT_CACHE"] = str(toy_cache)
    compare(*arguments, "anomaly=[toy_anomalies]")
    assert all(path.stat().st_mtime_ns == then for path, then in before.items()), "nothing was trained again"
    yield folder, arguments
    del ENVIRONMENT["EOMT_CACHE"]


def test_finished_cells_are_scored_on_benchmarks_that_are_added_and_keep_no_logits(scored):
    for path in anomalies(scored[0], "none", "lora_r4"):
        assert read(path)["images"] == 60 and path.with_suffix(".png").is_file()
        assert not (path.parent / "logits").exists()
    assert "Toy anomalies" in (scored[0] / "none" / "seed_3" / "run.log").read_text()


def test_only_what_is_missing_of_the_benchmarks_is_scored_again(scored):
    folder, arguments = scored
    lost, kept = anomalies(folder, "lora_r4", "none")
    before = kept.stat().st_mtime_ns
    lost.with_suffix(".png").unlink()  # the last that an evaluation writes
    result = compare(*arguments)
    assert result.stdout.count("finished before, kept") == 1 and "2 of 2 cells finished" in result.stdout
    assert lost.with_suffix(".png").is_file() and kept.stat().st_mtime_ns == before


def test_the_report_has_anomaly_columns_and_refuses_scores_of_an_earlier_network(scored, tmp_path):
    shutil.copytree(scored[0] / "lora_r4" / "seed_3", tmp_path / "run")
    compare("report", tmp_path / "run", "--output", tmp_path / "report", "--score", "msp")
    assert "Anomaly segmentation, by the score msp." in (tmp_path / "report" / "report.md").read_text()
    scores = tmp_path / "run" / "anomaly" / "toy_anomalies.json"
    scores.write_text(json.dumps(read(scores) | {"artefact_id": "0" * 64}))
    error = compare("report", tmp_path / "run", "--output", tmp_path / "report", code=1).stderr
    assert "toy_anomalies.json is not of the network that the run ended with: score again" in error


def test_a_benchmark_that_cannot_be_scored_costs_no_run_its_miou(matrix, scored, tmp_path):
    for part, pixels in (("images", np.zeros((64, 128, 3))), ("labels_masks", np.indices((64, 128))[1] // 64)):
        (tmp_path / "fs_static" / part).mkdir(parents=True)
        Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "fs_static" / part / "0.png")
    picture = tmp_path / "fs_static" / "images" / "0.png"
    picture.write_bytes(picture.read_bytes()[:60])
    folder = tmp_path / "matrix"
    shutil.copytree(scored[0], folder)
    shutil.rmtree(folder / "lora_r4")
    (folder / "matrix.json").write_text(
        json.dumps(read(folder / "matrix.json") | {"variants": ["none"], "anomaly": []})
    )
    words = [word for word in scored[1] if not word.startswith(("variants", "output_dir"))]
    for path in (folder / "none" / "seed_3" / "anomaly").iterdir():
        path.unlink()
    words += [
        "variants=[none]",
        f"output_dir={folder}",
        "anomaly=[fs_static,toy_anomalies]",
        f"anomaly_root={tmp_path}",
    ]
    result = compare(*words, code=1)
    assert "failed: none, seed 3: " in result.stdout and "cannot be decoded" in result.stdout
    cell = read(folder / "none" / "seed_3" / "cell.json")
    assert cell["status"] == "finished" and "cannot be decoded" in cell["anomaly_errors"]["fs_static"]
    assert anomalies(folder, "none")[0].is_file() and not list(folder.rglob("logits")), "the other one was scored"
    compare("report", folder, "--output", tmp_path / "report")
    text = (tmp_path / "report" / "report.md").read_text()
    assert "none, the baseline, reaches" in text and "| none | " in text
    assert "FS Static could not be scored for none seed 3: " in text and "cannot be decoded" in text


def test_how_objects_are_pasted_is_nothing_to_a_variant_that_pastes_none(settings, tmp_path):
    words = [word for word in settings if not word.startswith("experiment=")] + ["experiment=toy_anomalies"]
    result = compare(
        "run", *words, "variants=[rba,baseline]", "data.cut_paste.probability=0.3", "data.cut_paste.cutouts.number=3",
        f"output_dir={tmp_path}",
    )  # fmt: skip
    assert "2 of 2 cells finished" in result.stdout
    pasted, plain = (read(tmp_path / variant / "seed_0" / "summary.json")["data"] for variant in ("rba", "baseline"))
    assert "probability=0.3" in pasted["cut_paste"] and "cut_paste" not in plain
    assert "data.cut_paste.probability=0.3" not in read(tmp_path / "baseline" / "seed_0" / "cell.json")["command"]


def test_what_depends_on_no_seed_runs_once(settings, toy_run, tmp_path, monkeypatch):
    monkeypatch.chdir(toy_run[0])
    words = [*settings, "model.ckpt_path=model", "variants=[none,head]", "seeds=[4,5]", f"output_dir={tmp_path}"]
    facts, _ = parse_matrix(words, "cityscapes")
    check_matrix(facts, check_composed)
    assert list(facts["cells"]) == ["none/seed_4", "head/seed_4", "head/seed_5"]
    for word in ("model.load_ckpt_class_head=false", "data.data_seed=${seed}"):
        check_matrix(other := facts | {"overrides": [*facts["overrides"], word]}, check_composed)
        assert "none/seed_5" in other["cells"], "random weights and data may depend on the seed"


def test_a_variant_that_runs_once_is_left_out_with_further_seeds(matrix):
    folder, arguments, _ = matrix
    words = [word.replace("[none,lora_r4,full]", "[none]").replace("[3]", "[3,4]") for word in arguments]
    before = read(folder / "matrix.json")
    (folder / "matrix.json").write_text(json.dumps(before | {"variants": ["none"]}))
    result = compare(*words)
    (folder / "matrix.json").write_text(json.dumps(before))
    assert "none depends on no seed, runs with seed 3 alone" in result.stdout
    assert "1 of 1 cells finished" in result.stdout and not (folder / "none" / "seed_4").exists()


def test_other_settings_in_the_same_folder_are_refused(matrix):
    result = compare(*matrix[1], "trainer.max_epochs=3", code=1)
    assert "holds a matrix with overrides" in result.stderr and "another output_dir=" in result.stderr


def test_one_failed_cell_does_not_end_the_others_and_says_why(settings, tmp_path):
    arguments = ["data.batch_size=1", "trainer.max_epochs=3", "model.lora_lr=1e-30", f"output_dir={tmp_path}"]
    result = compare("run", *settings, "variants=[lora_r4,none]", *arguments, code=1)
    assert "1 of 2 cells finished" in result.stdout
    failed, fine = (read(tmp_path / variant / "seed_0" / "cell.json") for variant in ("lora_r4", "none"))
    assert failed["status"] == "failed" and failed["error"].startswith("LoRA audit")
    assert fine["status"] == "finished"
    assert "failed: lora_r4, seed 0: LoRA audit" in result.stdout


def test_a_matrix_that_was_killed_goes_on_where_it_stopped(settings, tmp_path):
    arguments = ["run", *settings, "variants=[head]", "trainer.max_epochs=6", f"output_dir={tmp_path}"]
    command = [sys.executable, str(ROOT / "scripts" / "compare.py"), *arguments]
    process = subprocess.Popen(command, env=ENVIRONMENT, start_new_session=True, stdout=subprocess.DEVNULL)
    last = tmp_path / "head" / "seed_0" / "checkpoints" / "last.ckpt"
    while process.poll() is None and not is_zipfile(last):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "head" / "seed_0" / "cell.json").exists(), "it was not killed in time"
    compare(*arguments)
    summary = read(tmp_path / "head" / "seed_0" / "summary.json")
    assert summary["status"] == "finished" and summary["steps"] == 12
    assert summary["parts"] == 2


def test_a_matrix_passes_a_signal_on_and_its_run_holds_its_folder_when_the_matrix_is_killed(settings, tmp_path):
    arguments = ["run", *settings, "variants=[head]", "trainer.max_epochs=200", f"output_dir={tmp_path}"]
    command = [sys.executable, str(ROOT / "scripts" / "compare.py"), *arguments]
    run = tmp_path / "head" / "seed_0"

    def start():
        process = subprocess.Popen(
            command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        before = steps_in(newest_checkpoint(run)) if newest_checkpoint(run) else 0
        while process.poll() is None and not (newest_checkpoint(run) and steps_in(newest_checkpoint(run)) > before):
            time.sleep(0.1)
        return process

    process = start()
    process.send_signal(signal.SIGTERM)
    assert "interrupted by SIGTERM: the same command goes on from here" in process.communicate(timeout=60)[1]
    assert process.returncode == 143 and read(run / "summary.json")["status"] == "interrupted"
    assert not (run / "cell.json").exists()

    process = start()
    process.kill()
    process.wait()
    assert in_use(run)
    assert "another process runs it, left alone" in compare(*arguments, code=1).stdout
    orphan = subprocess.run(["pgrep", "-f", f"output_dir='{run}'"], capture_output=True, text=True, check=True).stdout
    for word in orphan.split():
        os.kill(int(word), signal.SIGKILL)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["variants=[hed]"], "variant hed is not in configs/variant: choose from"),
        (
            ["variants=[head]", "model.lora_rnk=3"],
            "model.lora_rnk is not in the configuration; did you mean lora_rank?",
        ),
        (["variants=[head]", "variant=full"], "variant=full: this is not for a matrix to be told: give variants=[...]"),
        (["variants=[head]", "patience=3"], "runs must have equally many steps"),
        (["variants=[head]", "model.freeze=[]"], "model.freeze=[] makes of variant head, which has ['backbone']"),
        (["variants=[lora_r8]", "model.lora_blocks=1"], "model.lora_blocks=1 makes of variant lora_r8, which has all"),
        (["variants=[head]", "seeds=[a]"], "seeds are integers"),
        (["variants=[head]", "model.lr=-1"], "must be greater than 0"),
        (["variants=[head]", "source=data=camvit"], "data=camvit is not a dataset"),
        (["variants=[head]", "anomaly=[toys]"], "anomaly=toys is no benchmark; choose from road_anomaly_21"),
        (["variants=[head]", "anomaly=[fs_static]"], "anomaly=fs_static needs anomaly_root=FOLDER"),
        (["variants=[head]", "anomaly=[toys,fs_static]"], "; and anomaly=fs_static needs anomaly_root=FOLDER"),
        (["variants=[head]", "anomaly=[fs_static]", "anomaly_root=/nowhere"], "/nowhere"),
        (["variants=[rba]", "model.outlier_loss=mask2anomaly"], "model.outlier_loss=mask2anomaly makes of variant rba"),
        (
            ["variants=[baseline]", "data.cut_paste={_target_: eomt.anomaly.cut_paste.CutPaste}"],
            "makes of variant baseline, which has None",
        ),
        (["variants=[head]", "hydra/launcher=slurmy"], "hydra/launcher=slurmy is not there"),
    ],
)
def test_a_mistake_is_one_sentence_before_anything_runs(settings, tmp_path, arguments, sentence):
    result = compare("run", *settings, *arguments, f"output_dir={tmp_path / 'new'}", code=1)
    assert sentence in result.stderr and "Traceback" not in result.stderr
    assert not list(tmp_path.glob("new/*/*/summary.json"))


def test_data_that_are_not_there_are_noticed_before_the_first_run(settings, tmp_path):
    start = [word for word in settings if word.startswith("model.ckpt_path")]
    words = [
        "experiment=camvid_dusk",
        *start,
        "data.root=/nowhere",
        "variants=[head]",
        f"output_dir={tmp_path / 'new'}",
    ]
    assert "CamVid needs the folder /nowhere/train" in compare("run", *words, code=1).stderr
    assert not (tmp_path / "new").exists()


def test_a_cell_that_another_process_runs_is_left_alone(matrix, settings):
    folder, arguments, _ = matrix
    one = [word.replace("variants=[none,lora_r4,full]", "variants=[none]") for word in arguments]
    with FileLock(folder / ".full_seed_3.lock"):
        assert "full, seed 3: another process runs it, left alone" in compare(*one).stdout


def test_a_failed_audit_is_not_forgotten_by_running_the_matrix_again(settings, tmp_path):
    arguments = ["data.batch_size=1", "trainer.max_epochs=3", "model.lora_lr=1e-30", f"output_dir={tmp_path}"]
    for _ in range(2):
        compare("run", *settings, "variants=[lora_r4]", *arguments, code=1)
    cell = read(tmp_path / "lora_r4" / "seed_0" / "cell.json")
    assert cell["error"].startswith("LoRA audit")
    earlier = tmp_path / "lora_r4" / "seed_0" / "earlier_1"
    assert (
        read(earlier / "summary.json")["status"].startswith("failed: LoRA audit") and (earlier / "checkpoints").is_dir()
    )
    assert read(tmp_path / "lora_r4" / "seed_0" / "summary.json")["parts"] == 1


def test_the_report_scores_a_run_again_that_went_on_after_its_evaluation(matrix, tmp_path):
    shutil.copytree(matrix[0] / "full" / "seed_3", tmp_path / "run")
    summary, scores = tmp_path / "run" / "summary.json", tmp_path / "run" / "evaluation" / "target.json"
    before = read(scores)
    os.utime(scores, (0, 0))  # as after a clone
    assert "evaluating" not in compare("report", tmp_path / "run", "--output", tmp_path / "report").stdout
    scores.write_text(json.dumps(before | {"artefact_id": "0" * 64}))
    assert "evaluating" in compare("report", tmp_path / "run", "--output", tmp_path / "report").stdout
    assert read(scores) == before and before["artefact_id"] == read(summary)["artefact_id"]
    assert (tmp_path / "report" / "report.html").stat().st_size > 10_000


def test_the_configuration_may_be_named_anywhere_among_the_overrides(settings, tmp_path):
    words = [*settings, "--config-name", "cityscapes_nope", "variants=[head]", f"output_dir={tmp_path / 'new'}"]
    assert "cityscapes_nope" in compare("run", *words, code=1).stderr


def test_help_shows_examples_and_variants():
    text = compare("--help").stdout
    assert "examples:" in text and "lora_r16" in text and "report" in text
    assert "seeds=[...]" in compare("run", "--help").stdout


def test_anomaly_variants_differ_in_head_loss_and_pasted_objects_and_in_what_trains_for_lora():
    from hydra import compose, initialize_config_dir

    def settings(variant):
        with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
            config = compose("cityscapes", ["experiment=toy_anomalies", f"variant={variant}"])
        parts = (config.model.head, config.model.load_ckpt_class_head, config.model.outlier_loss)
        return (*parts, config.data.cut_paste is not None), config.model.use_lora

    wanted = {
        "baseline": ("linear", True, None, False),
        "rba": ("linear", True, "rba", True),
        "arcface": ("arcface", False, None, False),
        "arcface_rba": ("arcface", False, "rba", True),
    }
    for variant, parts in wanted.items():
        assert settings(variant) == (parts, False)
        assert settings(f"{variant}_lora") == (parts, True)


@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_cells_run_on_other_launchers_of_hydra(settings, tmp_path, launcher):
    pytest.importorskip(f"hydra_plugins.hydra_{launcher.split('_')[0]}_launcher", reason="the extra launchers")
    result = compare("run", *settings, "variants=[none]", f"hydra/launcher={launcher}", f"output_dir={tmp_path}")
    assert "1 of 1 cells finished" in result.stdout


def test_settings_are_chosen_on_held_out_training_images_and_images_are_an_axis(settings, tmp_path):
    words = [
        "run",
        *settings,
        "variants=[head]",
        "images=[4,all]",
        "tune=model.lr=[1e-4,1e-3]",
        f"output_dir={tmp_path}",
    ]
    result = compare(*words)
    assert "2 of 2 cells finished" in result.stdout and "chosen for head, on held-out training images" in result.stdout
    tuning = read(tmp_path / "tuning" / "head.json")
    scores = {trial["settings"]["model.lr"]: trial["miou"] for trial in tuning["trials"]}
    assert tuning["chosen"]["model.lr"] == max(scores, key=scores.get) and len(scores) == 2
    few, many = (read(tmp_path / "head" / part / "summary.json") for part in ("images_4/seed_0", "seed_0"))
    assert few["data"]["train_images"] == 4 < many["data"]["train_images"]
    assert few["data"]["val"] == many["data"]["val"] != tuning["data"]["val"], "the validation images chose nothing"
    held, kept = tuning["data"]["val_images"], tuning["data"]["train_images"]
    assert held + kept == many["data"]["train_images"] and held == round(0.2 * (held + kept))
    for part in ("images_4/seed_0", "seed_0"):
        assert f"model.lr={tuning['chosen']['model.lr']}" in read(tmp_path / "head" / part / "cell.json")["command"]
    again = compare(*words)
    assert again.stdout.count("finished before, kept") == 4
    changed = compare(*(word.replace("model.lr", "model.weight_decay") for word in words), code=1)
    assert "holds a matrix that chooses model.lr, and tune= gives head model.weight_decay" in changed.stderr
