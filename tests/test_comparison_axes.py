"""The report of a matrix with several numbers of training images, and with settings that it chose."""

import csv
import json
import shlex
import shutil
import statistics
from contextlib import redirect_stdout
from io import StringIO

import pytest
import yaml
from latex import assert_fits_the_page, needs_latex
from test_comparison import confusion, digest, rewrite, write_failed, write_run

from benchmarks import figures
from eomt.comparison.axes import by_images
from eomt.comparison.facts import learning_rates, matrix_commands
from eomt.comparison.matrix import parse_matrix
from eomt.comparison.page import write_report
from eomt.comparison.runs import load_runs
from eomt.comparison.statistics import check_unique
from eomt.comparison.table import NONE
from eomt.comparison.tuning import read_tuning
from eomt.reporting.run_summary import git_commit
from eomt.settings.formats import TUNING, stamped

SIZES = {16: 0.2, 64: 0.1, None: 0.0}  # training images, and what they lack in accuracy


def write_axes(root, variants=("lora_r8", "full"), also=()):
    """Variants with two seeds, three numbers of images; a choice of the learning rate for each, `also` of others."""
    (root / "tuning").mkdir(parents=True)
    (root / "matrix.json").write_text(json.dumps({"variants": variants, "seeds": [0, 1]}))
    for variant in variants:
        quality = 0.8 if variant == "full" else 0.85
        for size, lack in SIZES.items():
            for seed in (0, 1):
                folder = root / variant / ("" if size is None else f"images_{size}") / f"seed_{seed}"
                data = {"train": digest(f"train {size}"), "val": digest("target"), "train_images": size or 367}
                write_run(folder, variant, seed, confusion(round(quality - lack, 2), seed), data=data)
                config = yaml.safe_load((folder / "config.yaml").read_text()) | {"data": {"train_images": size}}
                (folder / "config.yaml").write_text(yaml.safe_dump(config))
        scores = {1e-4: 0.5, 1e-3: 0.7, 1e-2: None} if variant == "full" else {1e-4: 0.4, 1e-3: 0.5, 1e-2: 0.6}
        trials = [
            {"settings": {"model.lr": lr, **dict(also)}, "miou": miou, "steps": 50}
            | {"error": None if miou else "the loss is NaN"}
            for lr, miou in scores.items()
        ]
        chosen, edges = (1e-3, {}) if variant == "full" else (1e-2, {"model.lr": "highest"})
        facts = {"variant": variant, "chosen": {"model.lr": chosen, **dict(also)}, "edges": edges, "trials": trials}
        facts |= {"hold_out": 0.2, "seed": 0, "data": {"val_images": 73, "train_images": 294}}
        (root / "tuning" / f"{variant}.json").write_text(json.dumps(stamped(TUNING, facts)))
    (root / "tuning" / "full" / "trial_0").mkdir(parents=True)
    (root / "tuning" / "full" / "trial_0" / "summary.json").write_text('{"status": "finished"}')
    return root


@pytest.fixture
def matrix(tmp_path):
    return write_axes(tmp_path / "matrix")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The same, which no test changes."""
    return write_axes(tmp_path_factory.mktemp("whole") / "matrix")


@pytest.fixture(scope="module")
def report(whole, tmp_path_factory):
    """The texts of its report by their endings, those of Markdown without its escapes; "" is what the console shows."""
    console = StringIO()
    with redirect_stdout(console):
        texts = written(load_runs([whole]), tmp_path_factory.mktemp("report") / "report", tunings=read_tuning(whole))
    return texts | {"": " ".join(console.getvalue().split())}


def written(runs, folder, **options):
    write_report(runs, folder, **options)
    texts = {path.suffix: path.read_text() for path in folder.iterdir()}
    return texts | {".md": texts[".md"].replace("\\", "")}


def read_csv(file):
    lines = [line for line in file.read_text().splitlines() if not line.startswith("#")]
    return list(csv.DictReader(lines))


def test_trials_are_no_runs_and_runs_are_grouped_by_their_images(whole):
    assert {size: len(runs) for size, runs in by_images(load_runs([whole])).items()} == {16: 4, 64: 4, None: 4}


def test_the_headline_is_of_all_images_and_a_table_tells_of_fewer(report):
    for kind in (".md", ".html"):
        for row in ("16, lora", "64, full", "367, lora"):
            assert row in report[kind].replace("\\_", "_"), kind
    assert report[".csv"].count("\nlora_r8,") == 1, "the table of all images"


def test_what_was_chosen_is_told_with_its_trials_and_a_value_at_the_edge_is_marked(report):
    text = report[".md"].replace("\\", "")
    assert "| full | model.lr 0.001 | 3, 1 failed | 50 | 73 of 367 | 70.00 |" in text
    assert "| lora_r8 | model.lr 0.01 (the highest that was tried) | 3 | 50 | 73 of 367 | 60.00 |" in text
    assert "the validation images chose nothing" in text and "tuned for no variant" not in text


def test_the_page_draws_choices_and_scores_by_images(report):
    page = report[".html"]
    assert 'alt="mIoU against 16, 64, 367 training images. Means in percent: lora_r8 ' in page
    alt = "mIoU on held-out training images against model.lr. Taken: lora_r8 0.01 (the highest that was tried); full"
    assert f'alt="{alt}' in page


def fail(matrix, folder, variant, seed, with_config=True):
    """Puts a cell that failed in the place of one that finished."""
    config = (matrix / folder / "config.yaml").read_text()
    shutil.rmtree(matrix / folder)
    write_failed(matrix / folder, variant, seed, "NaN in step 3")
    if with_config:
        (matrix / folder / "config.yaml").write_text(config)
    size = folder.split("images_")[1].split("/")[0]
    rewrite(matrix / folder / "cell.json", command=["python", "train_with_lora.py", f"data.train_images={size}"])


@pytest.mark.parametrize("with_config", [True, False], ids=["failed while training", "refused before"])
def test_where_the_baseline_failed_with_few_images_the_others_are_told_without_a_difference(
    matrix, tmp_path, with_config
):
    for seed in (0, 1):
        fail(matrix, f"full/images_16/seed_{seed}", "full", seed, with_config)
    texts = written(load_runs([matrix]), tmp_path / "report")
    row = next(line for line in texts[".md"].splitlines() if line.startswith("| 16, lora_r8"))
    assert row.split(" | ")[-2:] == [NONE, f"{NONE} |"] and "±" in row
    assert not [line for line in texts[".md"].splitlines() if line.startswith("| 16, full")]
    for kind in (".md", ".tex", ".html"):
        for seed in (0, 1):
            text = f"full seed {seed} on 16 images failed and counts in no mean: NaN in step 3"
            assert text in texts[kind].replace("\\", ""), kind
        assert "No difference with 16 training images: full has no score there." in texts[kind], kind
    assert texts[".html"].count("<pre>NaN in step 3</pre>") == 2
    facts = json.loads(texts[".json"])
    lora, full = next(part["table"] for part in facts["fewer_images"] if part["training_images"] == 16)
    assert full["miou_percent"] is None and full["reading"] == NONE
    assert lora["miou_percent"] and lora.get("difference_points") is None and lora["reading"] == NONE
    rows = [row.split(" | ") for row in figures.images(facts).splitlines()[2:]]
    assert rows[0][0] == "| `lora_r8`" and rows[0][1].endswith(f"; {NONE}") and "baseline" not in rows[0][1]
    assert rows[1][0] == "| `full`" and "±" not in rows[1][1]


def test_a_number_of_images_with_which_every_run_failed_is_told(matrix, tmp_path):
    for variant in ("full", "lora_r8"):
        for seed in (0, 1):
            fail(matrix, f"{variant}/images_16/seed_{seed}", variant, seed)
    texts = written(load_runs([matrix]), tmp_path / "report")
    assert texts[".md"].count("on 16 images failed and counts in no mean: NaN in step 3") == 4
    assert "| 64, full" in texts[".md"] and "| 16, " not in texts[".md"]


def test_few_images_have_steps_readings_marks_and_warnings_of_their_own(matrix, tmp_path):
    shutil.rmtree(matrix / "full" / "images_16" / "seed_1")
    rewrite(matrix / "full" / "images_16" / "seed_0" / "summary.json", steps=50)
    texts = written(load_runs([matrix]), tmp_path / "report", allow_different=True)
    rows = {line.split(" | ")[0]: line.split(" | ") for line in texts[".md"].splitlines() if line.startswith("| 16, ")}
    titles = next(line for line in texts[".md"].splitlines() if line.startswith("| training images, variant"))
    assert "difference to full (95 % interval), points | reading" in titles
    assert [row[2] for row in rows.values()] == ["100", "50"], "steps"
    assert rows["| 16, lora_r8 †"][-1].startswith("above in one seed")
    for kind in (".md", ".html"):
        assert "With 16 training images: † Not comparable with the other variants: numbers of steps" in texts[kind]
        assert "With 16 training images: One seed in the difference of lora_r8" in texts[kind], kind
        assert "nothing tells how other ones would turn out" in texts[kind], kind


def test_every_run_stands_in_the_list_with_its_number_of_images(whole, report):
    html = report[".html"]
    for size in (16, 64, None):
        for seed in (0, 1):
            folder = whole / "full" / ("" if size is None else f"images_{size}") / f"seed_{seed}"
            assert html.count(f"<td>{folder}</td>") == 1
            assert f"<h3>full seed {seed}{'' if size is None else f' on {size} images'}</h3>" in html


def test_a_choice_at_the_edge_is_explained_wherever_the_report_is_read(report):
    words = "Chosen at the edge of what was tried, so that a better value may lie beyond: "
    words += "lora_r8 model.lr 0.01 (the highest)."
    for kind in ("", ".md", ".tex", ".html"):
        assert words in report[kind].replace("\\", ""), kind
    assert f'<p class="warning">{words}</p>' in report[".html"]


def test_variants_that_nothing_was_chosen_for_are_named(matrix, tmp_path):
    tunings = [tuning for tuning in read_tuning(matrix) if tuning["variant"] == "full"]
    text = written(load_runs([matrix]), tmp_path / "report", tunings=tunings)[".md"]
    assert "Settings were chosen for full on training images that were held out; the validation images chose" in text
    assert "lora_r8 has the experiment's, tuned for no variant in particular." in text
    assert "chosen for each variant" not in text


def test_runs_on_other_numbers_of_images_are_not_one_run_twice(matrix):
    runs = load_runs([matrix])
    check_unique(runs)
    with pytest.raises(ValueError, match=r"on 16 images occurs twice"):
        check_unique([*runs, *(run for run in load_runs([matrix]) if run.subset == 16)])


def test_what_was_chosen_with_more_images_than_a_run_had_is_said(report):
    words = (
        "Runs with fewer training images have the same settings, chosen with 294 images to train on and 73 held out."
    )
    for kind in ("", ".md", ".tex", ".html"):
        assert words in report[kind], kind


@needs_latex
def test_latex_tables_of_six_tuned_variants_and_few_images_fit_the_page(tmp_path):
    variants = ("head", "unfreeze_last_n", "lora_r4", "lora_r16", "lora_last_k", "full")
    matrix = write_axes(tmp_path / "matrix", variants, {"model.lora_lr": 3e-4})
    texts = written(load_runs([matrix]), tmp_path / "report", tunings=read_tuning(matrix))
    assert all(words in texts[".tex"] for words in ("By the number of training images", "What was chosen"))
    assert_fits_the_page(tmp_path / "report")


def test_trials_that_failed_are_told_with_their_reason(report):
    for kind in ("", ".md", ".tex", ".html"):
        assert "A trial of full with model.lr 0.01 has no score: the loss is NaN." in report[kind], kind


def test_every_value_that_was_tried_stands_in_a_table_and_in_the_json_file(report):
    assert "| variant | 0.0001 | 0.001 | 0.01 |" in report[".md"]
    assert "| lora_r8 | 40.00 | 50.00 | 60.00 (taken) |" in report[".md"]
    assert "| full | 50.00 | 70.00 (taken) | failed |" in report[".md"]
    tuning = {each["variant"]: each for each in json.loads(report[".json"])["tuning"]}
    assert [trial["miou"] for trial in tuning["full"]["trials"]] == [0.5, 0.7, None]
    assert tuning["lora_r8"]["edges"] == {"model.lr": "highest"} and tuning["full"]["hold_out"] == 0.2


def test_of_several_settings_each_is_shown_at_the_best_of_the_others_and_that_is_said(matrix, tmp_path):
    (lora,) = [tuning for tuning in read_tuning(matrix) if tuning["variant"] == "lora_r8"]
    scores = {(1e-4, 1): 0.3, (1e-4, 2): 0.5, (1e-3, 1): 0.6, (1e-3, 2): None}
    lora["trials"] = [{"settings": {"a": a, "b": b}, "miou": m, "steps": 5} for (a, b), m in scores.items()]
    lora |= {"chosen": {"a": 1e-3, "b": 1}, "edges": {}}
    texts = written(load_runs([matrix]), tmp_path / "report", tunings=[lora])
    assert (
        "| lora_r8 | 50.00 | 60.00 (taken) |" in texts[".md"] and "| lora_r8 | 60.00 (taken) | 50.00 |" in texts[".md"]
    )
    for kind in (".md", ".html"):
        assert "the best over the other settings" in texts[kind]


def test_the_json_file_says_what_was_compared(report):
    compared = json.loads(report[".json"])["compared"]
    assert compared["Experiment"] == [{"value": "test", "runs": ""}]
    assert {each["runs"] for each in compared["What trains"]} == {"lora_r8 seeds 0, 1", "full seeds 0, 1"}


def test_without_them_nothing_of_it_stands_in_a_report(matrix, tmp_path):
    runs = [run for run in load_runs([matrix]) if run.subset is None]
    write_report(runs, tmp_path / "plain")
    assert "Images and settings" not in (tmp_path / "plain" / "report.html").read_text()
    assert "tuned for no variant" in (tmp_path / "plain" / "report.md").read_text()


@pytest.fixture
def measured(tmp_path):
    """Runs that had the machine for themselves, of one seed and fewer steps."""
    for variant in ("lora_r8", "full"):
        seconds = {"total": 0.2, "data": 0.0, "compute": 0.123 if variant == "full" else 0.119}
        memory = {"bytes": 77 << 20, "of": "resident set of the process"}
        changes = {"steps": 30, "seconds_per_step": seconds, "peak_memory": memory, "git_commit": "c" * 40}
        write_run(tmp_path / "measured" / variant / "seed_0", variant, **changes)
    return tmp_path / "measured"


def test_seconds_and_memory_can_come_from_runs_that_had_the_machine_for_themselves(matrix, measured, tmp_path):
    write_report(load_runs([matrix]), tmp_path / "alone")
    write_report(load_runs([matrix]), tmp_path / "report", costs=load_runs([measured]))
    alone, rows = (read_csv(tmp_path / folder / "report.csv") for folder in ("alone", "report"))
    assert [row["compute_seconds_per_step"] for row in rows] == ["0.119", "0.123"]
    assert {int(row["peak_memory_bytes"]) for row in rows} == {77 << 20}
    assert [row["miou_percent"] for row in rows] == [row["miou_percent"] for row in alone], "scores stay the matrix's"
    text = (tmp_path / "report" / "report.md").read_text()
    assert "wall time" in (tmp_path / "alone" / "report.md").read_text()
    assert "wall time" not in text, "a shorter run does not tell it"
    assert "Seconds and memory are from other runs of these variants, of 30 steps" in text
    facts = json.loads((tmp_path / "report" / "report.json").read_text())
    assert facts["costs"]["git_commit"] == "c" * 40 != facts["git_commit"] and facts["costs"]["steps"] == 30
    assert len(facts["costs"]["commands"]) == 2 and facts["costs"]["seeds"] == [0]
    assert "costs" not in json.loads((tmp_path / "alone" / "report.json").read_text())


def test_costs_of_steps_that_do_something_else_are_refused(matrix, measured, tmp_path):
    config = measured / "full" / "seed_0" / "config.yaml"
    changed = yaml.safe_load(config.read_text()) | {"trainer": {"precision": "bf16-mixed"}}
    config.write_text(yaml.safe_dump(changed))
    with pytest.raises(ValueError, match=r"full/seed_0 has precision bf16-mixed, .* has 32-true"):
        write_report(load_runs([matrix]), tmp_path / "report", costs=load_runs([measured]))


def test_costs_must_hold_every_variant_that_took_steps(matrix, measured, tmp_path):
    costs = [run for run in load_runs([measured]) if run.variant == "full"]
    with pytest.raises(ValueError, match="holds no finished run of lora_r8"):
        write_report(load_runs([matrix]), tmp_path / "report", costs=costs)


def test_the_json_file_has_the_values_of_all_numbers_of_images_and_where_they_are_from(report):
    facts = json.loads(report[".json"])
    rows = {(part["training_images"], row["variant"]): row for part in by_size(facts) for row in part["table"]}
    assert list(rows) == [(n, name) for n in (16, 64, 367) for name in ("lora_r8", "full")]
    assert facts["baseline"] == "full" and rows[16, "full"]["reading"] == "baseline"
    with_csv = next(row for row in csv.DictReader(report[".csv"].splitlines()) if row["variant"] == "lora_r8")
    row = rows[367, "lora_r8"]
    assert {key: "" if row[key] is None else str(row[key]) for key in with_csv} == with_csv
    assert facts["seeds"] == [0, 1] and facts["git_commit"] == "0123456789abcdef" and facts["commands"]
    assert facts["report_commit"] == git_commit()
    assert facts["machine"] == {"platform": "Linux", "threads": 2, "gpus": []} and facts["versions"]["torch"] == "2.7.0"
    of_all = [
        run["target_miou_percent"] for run in facts["runs"] if run["variant"] == "full" and not run["train_images"]
    ]
    assert statistics.fmean(of_all) == pytest.approx(rows[367, "full"]["miou_percent"], abs=1e-5) and len(of_all) == 2
    assert facts["chosen"]["full"] == {"model.lr": 1e-3} and facts["steps"] == 100
    assert {run["variant"]: run["lora_audit"] for run in facts["runs"]} == {"lora_r8": "1 of 1 passed", "full": NONE}


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ({}, "0.0003, layer-wise decay 0.65, poly"),
        ({"llrd": 1.0}, "0.0003, poly"),
        ({"freeze": ["backbone"]}, "0.0003, poly"),
        ({"use_lora": True}, "0.0003, adapters 0.001, poly"),
    ],
    ids=["everything trains", "no decay", "heads", "LoRA"],
)
def test_rates_are_told_with_their_decay_by_layer_where_the_backbone_trains(model, told, tmp_path):
    rates = {"lr": 3e-4, "lora_lr": 1e-3, "llrd": 0.65, "lr_schedule": "poly", "weight_decay": 0.05}
    write_run(tmp_path / "run", "lora_r8" if "use_lora" in model else "full", model=rates | model)
    (run,) = load_runs([tmp_path / "run"])
    assert learning_rates(run).startswith(f"{told}, weight decay 0.05")


def by_size(facts):
    return [*facts["fewer_images"], facts]


def test_what_runs_do_not_share_is_told_of_each(matrix, tmp_path):
    summary = matrix / "full" / "seed_1" / "summary.json"
    summary.write_text(json.dumps(json.loads(summary.read_text()) | {"git_commit": "another"}))
    write_report(load_runs([matrix]), tmp_path / "report")
    facts = json.loads((tmp_path / "report" / "report.json").read_text())
    assert facts["git_commit"] == ["0123456789abcdef", "another"]


def test_settings_to_tune_may_be_given_in_several_words():
    facts = parse_matrix(["tune=model.lr=[1e-4,1e-3]", "tune=model.lora_lr=[1e-3,2e-3]"], "cityscapes")[0]
    assert facts["tune"]["full"] == {"model.lr": [1e-4, 1e-3], "model.lora_lr": [1e-3, 2e-3]}
    with pytest.raises(ValueError, match=r"must give model\.lr once"):
        parse_matrix(["tune=model.lr=[1e-4,1e-3]", "tune=model.lr=[1e-3,2e-3]"], "cityscapes")


def test_the_command_of_a_matrix_is_told_from_what_its_file_holds():
    overrides = ["experiment=camvid_dusk", "data.root='/a b'", "images=[16,all]", "tune=model.lr=[1e-4,1e-3]"]
    overrides += ["source=experiment=camvid_day data.root=x", "seeds=[0,1]", "anomaly=[toy_anomalies]"]
    facts = parse_matrix(overrides, "cityscapes_lora")[0]
    (told,) = matrix_commands(facts)
    words = shlex.split(told)
    assert words[:5] == ["python", "scripts/compare.py", "run", "--config-name", "cityscapes_lora"]
    assert parse_matrix(words[5:], "cityscapes_lora")[0] == facts


def test_variants_that_tried_other_values_have_a_command_of_their_own():
    grid, wider = {"model.lr": [1e-4, 1e-3]}, {"model.lr": [1e-5, 1e-4, 1e-3]}
    facts = parse_matrix(["experiment=camvid", "variants=[none,head,full]"], "cityscapes")[0]
    told = matrix_commands(facts | {"tune": {"none": grid, "head": grid, "full": wider}})
    parsed = [parse_matrix(shlex.split(command)[3:], "cityscapes")[0] for command in told]
    assert [each["tune"] for each in parsed] == [{"none": grid, "head": grid}, {"full": wider}]
    assert matrix_commands(facts | {"tune": grid}) == matrix_commands(
        facts | {"tune": dict.fromkeys(facts["variants"], grid)}
    ), "as earlier versions wrote it"
