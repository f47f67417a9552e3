"""What a matrix tries for each variant, and what it takes."""

import json
import re
import shutil

import pytest
from conftest import TOY_DATA
from omegaconf import OmegaConf

from eomt.comparison import matrix as matrices
from eomt.comparison.tuning import (
    choose_settings,
    chosen_settings,
    edges,
    grid_for,
    read_grid,
    read_tuning,
    trial_words,
    widened,
)
from eomt.settings.formats import SUMMARY, TUNING, read_format, stamped

NOTHING = OmegaConf.create({})
GRID = {"model.lr": [1e-4, 1e-3], "model.lora_lr": [1e-3, 2e-3, 4e-3]}


def config(use_lora=False, max_steps=-1, max_epochs=7, freeze=()):
    model = {"use_lora": use_lora, "freeze": list(freeze)}
    return OmegaConf.create({"model": model, "trainer": {"max_steps": max_steps, "max_epochs": max_epochs}})


def test_a_grid_is_read_in_ascending_order():
    assert read_grid("model.lr=[1e-3,1e-4] model.weight_decay=0,0.05") == {
        "model.lr": [1e-4, 1e-3],
        "model.weight_decay": [0, 0.05],
    }


@pytest.mark.parametrize(
    "text",
    [
        "model.lr",
        "model.lr=1e-4",
        "model.lr=[a,b]",
        "model.lr=[true,false]",
        "model.lr=[1,2] model.lr=[3,4]",
        "model.lr=[1,2",
        "model.lr='[1",
        "model.lr={a: 1}",
    ],
)
def test_what_is_no_grid_is_refused_with_its_words(text):
    with pytest.raises(ValueError, match="tune"):
        read_grid(text)


def test_each_variant_tries_all_combinations_of_what_means_something_to_it():
    assert len(grid_for(GRID, config(use_lora=True), NOTHING)) == 6
    assert grid_for(GRID, config(), NOTHING) == [{"model.lr": 1e-4}, {"model.lr": 1e-3}]
    own = OmegaConf.create({"model": {"lr": 5e-5}})  # which is what the variant's name means
    assert grid_for(GRID, config(use_lora=True), own) == [{"model.lora_lr": value} for value in GRID["model.lora_lr"]]
    assert grid_for(GRID, config(max_steps=0), NOTHING) == grid_for({}, config(), NOTHING) == []


def test_a_decay_by_layer_is_tried_where_the_backbone_trains():
    grid = {"model.lr": [1e-4, 1e-3], "model.llrd": [0.65, 0.8, 1.0]}
    assert len(grid_for(grid, config(), NOTHING)) == len(grid_for(grid, config(freeze=["queries"]), NOTHING)) == 6
    for frozen in (config(freeze=["backbone"]), config(use_lora=True)):
        assert grid_for(grid, frozen, NOTHING) == [{"model.lr": 1e-4}, {"model.lr": 1e-3}]


def test_a_trial_holds_training_images_out_and_takes_half_the_steps():
    assert trial_words({"model.lr": 1e-4}, config()) == [
        "model.lr=0.0001",
        "data.hold_out=0.2",
        "trainer.max_epochs=4",
        "callbacks.samples.every_n_epochs=0",
    ]
    assert "trainer.max_steps=50" in trial_words({}, config(max_steps=100))


def test_a_value_at_the_edge_of_what_was_tried_is_marked():
    tried = grid_for(GRID, config(use_lora=True), NOTHING)
    assert edges({"model.lr": 1e-4, "model.lora_lr": 2e-3}, tried) == {"model.lr": "lowest"}
    assert edges({"model.lr": 1e-3, "model.lora_lr": 4e-3}, tried) == {
        "model.lr": "highest",
        "model.lora_lr": "highest",
    }


@pytest.fixture
def matrix(tmp_path):
    """Three trials of `head` that ended with these scores; None: failed, "": has not ended."""

    def make(*scores):
        trials = {}
        for number, score in enumerate(scores):
            folder = tmp_path / "tuning" / "head" / f"trial_{number}"
            folder.mkdir(parents=True, exist_ok=True)
            trials[f"tuning/head/trial_{number}"] = {"model.lr": 10.0**-number}
            if score == "":
                continue
            status = "failed: NaN" if score is None else "finished"
            facts = {"status": status, "miou": score, "steps": 4, "seed": 3, "data": {"train": "a", "val": "b"}}
            (folder / "summary.json").write_text(json.dumps(stamped(SUMMARY, facts)))
            if score is None:
                (folder / "cell.json").write_text(json.dumps({"status": "failed", "error": "NaN"}))
        (tmp_path / "matrix.json").write_text(json.dumps({"variants": ["head"]}))
        return tmp_path, trials

    return make


def test_the_best_trial_is_taken_and_written_down_with_the_others(matrix):
    folder, trials = matrix(0.2, None, 0.4)
    choose_settings(folder, "head", trials)
    facts = read_format(folder / "tuning" / "head.json", TUNING)
    assert chosen_settings(folder, "head") == {"model.lr": 0.01}
    assert [trial["miou"] for trial in facts["trials"]] == [0.2, None, 0.4]
    assert facts["trials"][1]["error"] == "NaN" and facts["edges"] == {"model.lr": "lowest"}
    assert (facts["hold_out"], facts["seed"], facts["data"]["val"]) == (0.2, 3, "b")
    assert read_tuning(folder) == [facts]


def test_further_trials_change_a_choice_that_no_run_stands_on_and_its_edges(matrix):
    folder, trials = matrix(0.2, 0.4)
    choose_settings(folder, "head", trials)
    choose_settings(folder, "head", matrix(0.2, 0.4, 0.3)[1])
    facts = read_format(folder / "tuning" / "head.json", TUNING)
    assert facts["chosen"] == {"model.lr": 0.1} and facts["edges"] == {} and len(facts["trials"]) == 3
    choose_settings(folder, "head", matrix(0.2, 0.4, 0.3, 0.9)[1])
    assert chosen_settings(folder, "head") == {"model.lr": 1e-3}


def test_a_choice_that_runs_stand_on_is_not_changed_by_further_trials(matrix):
    folder, trials = matrix(0.2, 0.4)
    choose_settings(folder, "head", trials)
    run = folder / "head" / "images_4" / "seed_0"
    run.mkdir(parents=True)
    (run / "cell.json").write_text("{}")
    with pytest.raises(
        ValueError, match=r"model\.lr=0\.01 is better than model\.lr=0\.1, on which the runs in .* stand"
    ):
        choose_settings(folder, "head", matrix(0.2, 0.4, 0.9)[1])
    assert chosen_settings(folder, "head") == {"model.lr": 0.1}


def test_a_choice_among_the_same_trials_stays_though_a_score_came_later(matrix):
    folder, trials = matrix(0.2, 0.4, None)
    choose_settings(folder, "head", trials)
    choose_settings(folder, "head", matrix(0.2, 0.4, 0.9)[1])
    assert chosen_settings(folder, "head") == {"model.lr": 0.1}


def test_nothing_is_chosen_before_every_trial_has_ended(matrix):
    folder, trials = matrix(0.2, "", 0.4)
    with pytest.raises(ValueError, match="a trial of head has not ended"):
        choose_settings(folder, "head", trials)
    assert chosen_settings(folder, "head") == {}


def test_where_all_trials_failed_the_reason_is_told(matrix):
    folder, trials = matrix(None, None)
    with pytest.raises(ValueError, match="no trial has a score; the first says: NaN"):
        choose_settings(folder, "head", trials)


def end_trial(folder, number, miou=None, variant="head"):
    """Leaves what a trial leaves: this score, or none where it failed."""
    trial = folder / "tuning" / variant / f"trial_{number}"
    trial.mkdir(parents=True, exist_ok=True)
    facts = {"status": "failed: NaN" if miou is None else "finished", "miou": miou, "steps": 4}
    (trial / "summary.json").write_text(json.dumps(stamped(SUMMARY, facts)))
    (trial / "cell.json").write_text(json.dumps({"status": facts["status"].partition(":")[0], "error": "NaN"}))


def test_a_choice_is_told_before_the_runs_that_stand_on_it_and_an_edge_is_explained(
    tmp_path, toy_cache, monkeypatch, capsys
):
    def launch(folder, cells, launcher):
        for number, score in enumerate((0.2, 0.4)) if "tuning/head/trial_0" in cells else ():
            end_trial(folder, number, score)
        print("launched", *cells)

    monkeypatch.setattr(matrices, "launch", launch)
    words = ["variants=[head]", "tune=model.lr=[1e-4,1e-3]", f"output_dir={tmp_path}"]
    matrices.run_matrix(
        [*TOY_DATA, f"data.root={toy_cache}", "data.batch_size=2", *words], "cityscapes", lambda config: None
    )
    printed = capsys.readouterr().out
    trials, runs = printed.index("launched tuning/head/trial_0"), printed.index("launched head/seed_0")
    told = printed.index("chosen for head, on held-out training images: model.lr=0.001 (the highest that was tried)")
    assert trials < told < runs
    assert 'with "variants=[head]" and further values in tune= tries them' in printed


def test_values_are_added_for_the_variants_named_and_tried_alone(tmp_path, toy_cache, monkeypatch, capsys):
    launched = []

    def launch(folder, cells, launcher):
        launched.append(sorted(cells))
        for name in cells:
            variant, number = name.split("/")[1], int(name[-1])
            if name.startswith("tuning") and not (folder / name).is_dir():
                end_trial(folder, number, 0.2 + 0.1 * number, variant)

    def run(*words):
        words = [*TOY_DATA, f"data.root={toy_cache}", "data.batch_size=2", f"output_dir={tmp_path}", *words]
        code = matrices.run_matrix(words, "cityscapes", lambda config: None)
        return code, capsys.readouterr().out

    monkeypatch.setattr(matrices, "launch", launch)
    run("variants=[head,full]", "tune=model.lr=[1e-4,1e-3]")
    facts = json.loads((tmp_path / "matrix.json").read_text())
    facts["tune"] = facts["tune"]["head"]  # one grid for all, as earlier versions wrote it
    (tmp_path / "matrix.json").write_text(json.dumps(facts))
    run("variants=[full]", "tune=model.lr=[1e-5]")
    facts = json.loads((tmp_path / "matrix.json").read_text())
    trials = {name: cell["trial"]["model.lr"] for name, cell in facts["cells"].items() if "trial" in cell}
    known = {f"tuning/{name}/trial_{k}": lr for name in ("head", "full") for k, lr in enumerate((1e-4, 1e-3))}
    assert trials == known | {"tuning/full/trial_2": 1e-5}
    assert facts["tune"] == {"head": {"model.lr": [1e-4, 1e-3]}, "full": {"model.lr": [1e-5, 1e-4, 1e-3]}}
    assert chosen_settings(tmp_path, "full") == {"model.lr": 1e-5}
    assert chosen_settings(tmp_path, "head") == {"model.lr": 1e-3}
    (tmp_path / "head" / "seed_0").mkdir(parents=True)
    (tmp_path / "head" / "seed_0" / "cell.json").write_text("{}")
    code, printed = run("variants=[head]", "tune=model.lr=[1e-2,1e-1]")
    assert code == 1 and "model.lr=0.1 is better than model.lr=0.001, on which the runs in" in printed
    assert "move this folder to another place" in printed
    assert launched[-1] == ["full/seed_0"], "what stands on another choice is left alone"
    shutil.move(tmp_path / "head", tmp_path.parent / "head_before")
    run("variants=[head]", "tune=model.lr=[1e-2,1e-1]")
    assert chosen_settings(tmp_path, "head") == {"model.lr": 1e-1} and "head/seed_0" in launched[-1]


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        (["variants=[head]"], "that chooses model.lora_lr, model.lr: give tune= again, or another output_dir="),
        (["variants=[head]", "tune=model.weight_decay=[0,1]"], "gives head model.weight_decay: give the same"),
        (["variants=[head,full]", "tune=model.lr=[1,2]"], "gives full model.lr: give the same"),
    ],
)
def test_which_settings_are_chosen_stays_where_a_matrix_goes_on(tmp_path, toy_cache, monkeypatch, words, remedy):
    monkeypatch.setattr(matrices, "launch", lambda folder, cells, launcher: None)
    data = [*TOY_DATA, f"data.root={toy_cache}", "data.batch_size=2", f"output_dir={tmp_path}"]
    tune = "tune=model.lr=[1e-4,1e-3] model.lora_lr=[1e-3,2e-3]"
    matrices.run_matrix([*data, "variants=[head]", tune], "cityscapes", lambda config: None)
    with pytest.raises(ValueError, match=re.escape(remedy)):
        matrices.run_matrix([*data, *words], "cityscapes", lambda config: None)


@pytest.mark.parametrize("values", ["[1e-4]", "[1e-4,1e-4]", "[]"])
def test_one_value_leaves_no_choice_and_is_refused(values, tmp_path):
    words = ["experiment=toy_night", "variants=[head]", f"tune=model.lr={values}", f"output_dir={tmp_path}"]
    with pytest.raises(ValueError, match=r"tune: model\.lr=.* of head leaves no choice: give two numbers or more"):
        matrices.run_matrix(words, "cityscapes", lambda config: None)


def test_how_long_a_run_is_means_nothing_to_a_variant_that_trains_nothing(tmp_path, toy_cache, monkeypatch):
    monkeypatch.setattr(matrices, "launch", lambda folder, cells, launcher: None)
    words = [*TOY_DATA, f"data.root={toy_cache}", "data.batch_size=2", "trainer.max_steps=5"]
    own = ["variants=[none,head]", f"output_dir={tmp_path}"]
    matrices.run_matrix([*words, *own], "cityscapes", lambda config: None)
    cells = json.loads((tmp_path / "matrix.json").read_text())["cells"]
    assert "trainer.max_steps=5" in cells["head/seed_0"]["words"]
    assert "trainer.max_steps=5" not in cells["none/seed_0"]["words"]


def test_one_of_several_settings_may_be_tried_further():
    before = {"full": {"model.lr": [1, 2], "model.lora_lr": [1, 2]}, "head": {"model.lr": [1, 2]}}
    assert widened(before, {"full": {"model.lr": [0, 2]}})["full"] == {"model.lr": [0, 1, 2], "model.lora_lr": [1, 2]}
    assert widened(before, {"full": {"model.lr": [0, 2]}})["head"] == before["head"]
    with pytest.raises(ValueError, match="without tune=: leave it out"):
        widened({}, {"full": {"model.lr": [0, 2]}})


def test_a_matrix_goes_on_whatever_the_order_of_its_words(tmp_path, toy_cache, monkeypatch):
    monkeypatch.setattr(matrices, "launch", lambda folder, cells, launcher: None)
    own = ["variants=[head]", f"output_dir={tmp_path}"]
    words = [*TOY_DATA, f"data.root={toy_cache}", "data.batch_size=2"]
    matrices.run_matrix([*words, *own], "cityscapes", lambda config: None)
    before = json.loads((tmp_path / "matrix.json").read_text())
    matrices.run_matrix([*own, *reversed(words)], "cityscapes", lambda config: None)
    assert json.loads((tmp_path / "matrix.json").read_text()) == before
    with pytest.raises(ValueError, match="holds a matrix with overrides"):
        matrices.run_matrix([*words, "data.batch_size=3", *own], "cityscapes", lambda config: None)


def test_a_choice_between_the_edges_is_told_without_a_word_about_them(matrix, capsys):
    folder, trials = matrix(0.2, 0.4, 0.3)
    choose_settings(folder, "head", trials)
    matrices.tell_choices(folder)
    assert (
        capsys.readouterr().out.splitlines()[-1].endswith("chosen for head, on held-out training images: model.lr=0.1")
    )


def test_a_trial_that_failed_is_not_tried_again_once_the_choice_is_made(matrix, capsys):
    folder, trials = matrix(0.2, None)
    choose_settings(folder, "head", trials)
    cell = {"variant": "head", "seed": 0, "images": "all", "words": ["no_such_key=1"]}
    facts = {"variants": ["head"], "devices": [], "source": [], "anomaly": [], "config_name": "cityscapes"}
    cells = {name: cell | {"trial": settings} for name, settings in trials.items()}
    (folder / "matrix.json").write_text(json.dumps(facts | {"cells": cells}))
    matrices.launch(folder, ["tuning/head/trial_1"], [])
    assert "trial of model.lr=0.1: failed before, and the choice is made" in capsys.readouterr().out
