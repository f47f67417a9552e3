"""The command line, as a user types it: help, the guide's flags, and every mistake in one sentence."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import warm
from conftest import TOY_DATA, TOY_MODEL, run_cold, run_script
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from torch._utils import ExceptionWrapper

from eomt.cli import main as eomt
from eomt.command_line import one_sentence, quote_path, unquoted
from eomt.comparison import matrix
from eomt.comparison.matrix import parse_matrix, read_source
from eomt.flags import FLAGS, translate_flags
from eomt.inference.saved import find_artefact
from eomt.settings.compose import compose_run, data_of_run
from eomt.suggestions import not_found

ROOT = Path(__file__).parent.parent


def run(*arguments, cwd=None, **environment):
    return subprocess.run(
        [warm.python(), str(ROOT / "train_with_lora.py"), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdin=subprocess.DEVNULL,
        cwd=cwd,
    )


def test_help_shows_groups_lora_options_and_three_examples_without_loading_torch():
    started = time.perf_counter()
    result = run_cold("train_with_lora.py", "--help")
    print(f"--help took {time.perf_counter() - started:.2f} s")
    assert result.returncode == 0
    for words in (
        "camvid",
        "cityscapes_lora",
        "toy_night",
        "tensorboard",
        "model.lora_target_modules: [attn.qkv, attn.proj]",
    ):
        assert words in result.stdout
    assert result.stdout.count("python train_with_lora.py ") >= 3
    assert max(map(len, result.stdout.splitlines())) <= 120
    check = "import sys; sys.argv = ['x', '--help']; import train_with_lora; train_with_lora.main()"
    check += "; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True).returncode == 0


def test_the_guides_flags_become_overrides():
    words = "--use_lora --lora_rank 16 --lora_alpha 32 --lora_dropout 0.1 --epochs 50 --batch_size=4 --lr 1e-4".split()
    words += (
        "--img_size 512 1024 --num_workers 2 --dataset_root /d/c --ckpt_path e.bin --output_dir out --use_wandb".split()
    )
    assert translate_flags(words) == [
        "--config-name",
        "cityscapes_lora",
        "model.use_lora=true",
        "model.lora_rank=16",
        "model.lora_alpha=32",
        "model.lora_dropout=0.1",
        "trainer.max_epochs=50",
        "data.batch_size=4",
        "model.lr=1e-4",
        "model.img_size=[512,1024]",
        "data.num_workers=2",
        "data.root='/d/c'",
        "model.ckpt_path='e.bin'",
        "output_dir='out'",
        "logger=wandb",
    ]


@pytest.mark.parametrize(
    ("words", "overrides"),
    [
        ("--seed 3 --precision 32-true --devices 2", ["seed=3", "trainer.precision=32-true", "trainer.devices=2"]),
        ("--max_steps 50", ["trainer.max_steps=50", "trainer.max_epochs=-1"]),
        ("--max_steps 50 --epochs 2", ["trainer.max_steps=50", "trainer.max_epochs=2"]),
        ("--lora_target_modules qkv fc1 --seed 1", ["model.lora_target_modules=[qkv,fc1]", "seed=1"]),
        (
            "--lora_target_modules=qkv,proj --lora_blocks 4",
            ["model.lora_target_modules=[qkv,proj]", "model.lora_blocks=4"],
        ),
        ("--resume", ["resume='auto'"]),
        ("--resume --seed 1", ["resume='auto'", "seed=1"]),
        ("--resume runs/last.ckpt", ["resume='runs/last.ckpt'"]),
        ("--data camvid --dataset_root /d", ["data=camvid", "data.root='/d'"]),
        (
            "--images i --masks m --classes c.yaml",
            ["data=folder", "data.images='i'", "data.masks='m'", "data.classes='c.yaml'"],
        ),
        ("data=folder --images i", ["data=folder", "data.images='i'"]),
        ("--use_lora true --seed 1", ["--config-name", "cityscapes_lora", "model.use_lora=true", "seed=1"]),
        ("--use_lora=False", ["model.use_lora=false"]),
        ("--config mine --use_lora", ["--config-name", "mine", "model.use_lora=true"]),
    ],
)
def test_flags_that_users_know_from_elsewhere_become_overrides(words, overrides):
    assert translate_flags(words.split()) == overrides


def test_a_configuration_can_be_a_file_anywhere(tmp_path):
    (tmp_path / "mine.yaml").write_text("defaults: [cityscapes, _self_]\n")
    options = ["--config-dir", str(tmp_path), "--config-name", "mine"]
    assert translate_flags(["--config", str(tmp_path / "mine.yaml")]) == options
    with pytest.raises(ValueError, match=r"--config .*gone.yaml: no such file"):
        translate_flags(["--config", str(tmp_path / "gone.yaml")])


def test_every_flag_stands_for_something_that_the_configuration_has():
    base = "data=folder model=vit_small".split()
    for name, flag in FLAGS.items():
        values = {
            "--config": ["cityscapes"],
            "--data": ["folder"],
            "--model": ["vit_small"],
            "--img_size": ["64", "64"],
        }
        words = [name, *values.get(name, ["1"] * (flag.values or 1) if flag.values != 0 else [])]
        own = [word for word in translate_flags(words) if not word.startswith("-") and "=" in word]
        root = ["data=cityscapes"] if name == "--dataset_root" else []
        compose_run([*base, *root, *own])


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--data /data/cityscapes", "--data takes the name of a data set, got /data/cityscapes"),
        ("--lora_target_modules --seed 1", "--lora_target_modules takes values, one or more, got none"),
        ("--seed", "--seed takes 1 value, got none"),
    ],
)
def test_a_flag_without_what_it_takes_is_refused(words, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        translate_flags(words.split())


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--learning_rate 1", "unknown option --learning_rate; did you mean --lr?"),
        ("--batch-size 4", "unknown option --batch-size; did you mean --batch_size?"),
        ("--r 8", "unknown option --r; did you mean --lora_rank?"),
        ("--rank 8", "unknown option --rank; did you mean --lora_rank?"),
        ("--gpus 2", "unknown option --gpus; did you mean --devices?"),
        ("--lora", "unknown option --lora; did you mean --use_lora?"),
        ("--fp16", "unknown option --fp16; did you mean --precision?"),
        ("--weight-decay 0.1", "unknown option --weight-decay; did you mean model.weight_decay=VALUE?"),
        ("--patience 3", "unknown option --patience; did you mean patience=VALUE?"),
        ("--mask_template {name}_m", "unknown option --mask_template; did you mean data.mask_template=VALUE?"),
        ("--logger wandb", "unknown option --logger; did you mean logger=VALUE?"),
        ("--experiment toy_night", "unknown option --experiment; did you mean experiment=VALUE?"),
        ("--overwrite", "unknown option --overwrite: see --help"),
        ("-lr 1e-4", "unknown option -lr; did you mean --lr?"),
        ("-e 3", "unknown option -e: see --help"),
        ("--img_size 512 --epochs 3", "--img_size takes 2 values, got 512: write --img_size VALUE VALUE"),
        ("--classes", "--classes takes 1 value, got none: write --classes VALUE"),
        ("--use_lora=True8", "--use_lora takes true or false, got True8"),
    ],
)
def test_an_unknown_option_names_what_was_meant_and_nothing_far_from_it(words, sentence):
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}"):
        translate_flags(words.split())


def test_hydras_own_short_options_come_first_with_their_values():
    assert translate_flags(["seed=1", "-cn", "mine", "-c", "job"]) == ["-cn", "mine", "-c", "job", "seed=1"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("photos/", "photos/ is no setting: write key=value, without spaces around the =; --help lists the flags"),
        ("model.img_size = 512", "model.img_size is no setting: write key=value, without spaces around the ="),
        ("model.img_size=[512,512", "model.img_size=[512,512 cannot be read: close brackets and quotes, and put"),
        (
            "model.lora_rank=4,8",
            "model.lora_rank=4,8 is several values: --multirun makes a run of each, and model.lora_rank=[4,8] is a",
        ),
        ("model.lora_rank=range(1,3)", "model.lora_rank=range(1,3) is several values: --multirun makes a run of each"),
        ("model=vit_smal", "model=vit_smal is not there; did you mean vit_small? Choose from tiny, vit_7b_dinov3,"),
        ("experiment=camvid_dsk", "experiment=camvid_dsk is not there; did you mean camvid_dusk? Choose from anom"),
        ("pretrained=false", "pretrained is not in the configuration; did you mean model.pretrained?"),
        ("model.learning_rate=3", "model.learning_rate is not in the configuration; did you mean model.lr?"),
        ("model.batch_size=3", "model.batch_size is not in the configuration; did you mean data.batch_size?"),
        ("optimizer.lr=3", "optimizer.lr is not in the configuration; did you mean model.lr?"),
        ("lora_r=8", "lora_r is not in the configuration; did you mean model.lora_rank?"),
        ("data.images=x", "data.images is not in the configuration: data=folder has it"),
        ("trainer.callbacks=3", "trainer.callbacks is not in the configuration; did you mean callbacks?"),
    ],
)
def test_an_override_that_cannot_be_names_itself_and_what_was_meant(words, sentence):
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}"):
        compose_run(words.split())


def test_a_configuration_that_is_not_there_is_told_with_those_that_are():
    with pytest.raises(ValueError, match="--config-name cityscape_lora is not there; did you mean cityscapes_lora"):
        compose_run([], "cityscape_lora")


def test_a_path_that_is_not_there_or_of_the_other_kind_is_told_with_what_was_meant(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "classes.yaml").touch()
    assert not_found(tmp_path / "fotos", "folder") == f"{tmp_path}/fotos: no such folder; did you mean photos?"
    assert not_found(tmp_path / "classes.yaml", "folder") == f"{tmp_path}/classes.yaml is a file, a folder is meant"
    assert not_found("/nowhere/x") == "/nowhere/x: no such file or folder"
    assert not_found("o/toy_source/model").endswith(
        "train_with_lora.py experiment=toy_source output_dir=o/toy_source makes it"
    )
    with pytest.raises(ValueError, match=r"classes\.yaml is no saved network: give the adapter/ or model/ folder"):
        find_artefact(tmp_path / "classes.yaml")


def test_a_folder_to_resume_from_says_how_a_run_goes_on(tmp_path):
    import train_with_lora

    with pytest.raises(
        FileNotFoundError, match="is a folder, a checkpoint is meant: in a run's folder output_dir=FOLD"
    ):
        train_with_lora.check_composed(compose_run(["experiment=toy_source", f"resume={tmp_path}"]))


@pytest.mark.parametrize(
    ("word", "name"),
    [("dataset_report", "data"), ("merge_lora.py", "merge"), ("compare.py", "compare"), ("trian", "train")],
)
def test_a_command_is_found_by_the_name_of_its_script(word, name, capsys):
    assert eomt([word]) == 2
    assert f"eomt has no command {word}; did you mean {name}?" in capsys.readouterr().err


def test_settings_of_lora_without_lora_are_warned_of_and_no_sweep(caplog, tmp_path):
    import train_with_lora

    toys = ["experiment=toy_source", f"output_dir={tmp_path}/run"]

    def prepared(*words, job=None):
        caplog.clear()
        config = compose_run([*toys, *words])
        config.job = job
        train_with_lora.prepare(config, tmp_path / "run")
        return caplog.text

    sentence = "model.lora_rank=4 without LoRA, nothing reads it: add --use_lora, or leave it out"
    assert sentence in prepared("model.lora_rank=4")
    assert sentence in prepared("model.lora_rank=4", job="1 seed=2")
    with pytest.raises(ValueError, match=sentence):
        prepared("model.lora_rank=4", job="0 model.lora_rank=4")
    for words in (["model.use_lora=true"], ["model.use_lora=false"], ["variant=head"], ["lora=small"]):
        assert "without LoRA" not in prepared("model.lora_rank=4", *words)
    assert "model.lora_alpha=${model.lora_rank} without LoRA" in prepared("model.lora_alpha=${model.lora_rank}")


def test_a_sweep_over_a_mistyped_key_leaves_no_folder(tmp_path, monkeypatch, capsys):
    import train_with_lora

    monkeypatch.chdir(tmp_path)
    for folder in ([], ["output_dir=ranks"]):
        words = ["--multirun", "model=tiny", "data.root=x", "model.lora_ranks=4,8", *folder]
        assert train_with_lora.main(words) == 2
        assert "model.lora_ranks is not in the configuration; did you mean lora_rank?" in capsys.readouterr().err
        assert not list(tmp_path.iterdir())


def test_a_named_configuration_and_plain_overrides_pass_unchanged():
    words = ["model.lr=1", "--config-name=mine", "--use_lora", "--multirun", "seed=1,2", "--cfg", "job"]
    options = ["--config-name", "mine", "--multirun", "--cfg", "job"]
    assert translate_flags(words) == [*options, "model.lr=1", "model.use_lora=true", "seed=1,2"]


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["--lora_rnk", "4"], 2, r"unknown option --lora_rnk; did you mean --lora_rank\?"),
        (["--out", "runs"], 2, r"unknown option --out; did you mean --output_dir\?"),
        (["--img_size", "640", "model.lr=1"], 2, "--img_size takes 2 values, got 640"),
        (["lora.rank=8"], 2, r"lora.rank is not in the configuration; did you mean model.lora_rank\?"),
        (["rank=8"], 2, r"rank is not in the configuration; did you mean model.lora_rank\?"),
        (["lora_alpha=8"], 2, r"lora_alpha is not in the configuration; did you mean model.lora_alpha\?"),
        (
            ["data=folder", "--dataset_root", "/x"],
            2,
            "data.root is not .*: these data are named by data.images, data.m",
        ),
        (["model.lora_rnak=4"], 2, r"model.lora_rnak is not in the configuration; did you mean lora_rank\?"),
        (["data=nowhere"], 2, "data=nowhere is not there: choose from camvid, cityscapes, folder, toy_streets$"),
        (["model.lora_rank=[1"], 2, r"model.lora_rank=\[1 cannot be read: close brackets and quotes"),
        (["model.lora_rank=many"], 1, "model.lora_rank 'many': should be a valid integer"),
        (["+model.lora_rnak=4"], 1, "model.lora_rnak is unknown; did you mean lora_rank"),
        (["+modle.lr=1"], 1, "modle is unknown at the top of the configuration; did you mean model"),
        (["model.use_lora=true", "model.lora_rank=0"], 1, "rank 0"),
        (["data.root=/x", "model.use_lora=true", "model.lora_dropout=1.5"], 1, r"dropout 1\.5"),
        (
            ["data.root=/x", "model.img_size=[8,8]"],
            1,
            r"img_size \[8, 8\]: both sides must be multiples .* try \[16, 16\]",
        ),
        ([], 1, "data.root is required"),
        (["experiment=toy_night", "variant=lora_r8"], 1, "outputs/toy_source/model: no such file or folder"),
        (["data.root=/nowhere"], 1, "/nowhere/leftImg8bit_trainvaltest.zip"),
        (["data.root=/x", "resume=gone.ckpt"], 1, "gone.ckpt: no such checkpoint"),
        (["data.root=/x", "--ckpt_path", "gone.bin"], 1, "gone.bin: no such file"),
        (["--epochs", "ten"], 1, "trainer.max_epochs 'ten': should be a number, at least 1, or -1 with max_steps"),
        (["model.use_lora=yes"], 1, "model.use_lora 'yes': should be a valid boolean, true or false"),
        (["data.root=/x", "patience=ten"], 1, "patience 'ten': should be a valid integer"),
        (["data.root=/x", "trainer.strategy=fsdp"], 1, "use ddp"),
        (["data.root=/x", "~callbacks.audit"], 1, "callbacks.audit cannot be left out"),
    ],
)
def test_a_mistake_ends_in_one_sentence_without_a_traceback(tmp_path, arguments, code, sentence):
    result = run(*arguments, f"output_dir={tmp_path}", cwd=tmp_path)
    assert result.returncode == code
    (line,) = [line for line in result.stderr.splitlines() if line.strip()]
    assert line.startswith("error: ") and re.search(sentence, line)
    assert "Traceback" not in result.stdout + result.stderr


@pytest.mark.parametrize(
    ("word", "options"),
    [
        ("={use_dora:true}", {"use_dora": True}),
        ("={rank_pattern:{blocks.0.attn.qkv:8}}", {"rank_pattern": {"blocks.0.attn.qkv": 8}}),
        ("={rank_pattern:{^blocks.0:8,^blocks.1:4}}", {"rank_pattern": {"^blocks.0": 8, "^blocks.1": 4}}),
        (".rank_pattern={^blocks.0:8}", {"rank_pattern": {"^blocks.0": 8}}),
        ('={"rank_pattern": {"blocks.(?:0|1).attn.qkv$": 8}}', {"rank_pattern": {"blocks.(?:0|1).attn.qkv$": 8}}),
        (r"={rank_pattern: {'^blocks\.0\.attn': 8}}", {"rank_pattern": {r"^blocks\.0\.attn": 8}}),
        ("={init_lora_weights:'gaussian'}", {"init_lora_weights": "gaussian"}),
    ],
)
def test_options_of_lora_have_any_key_on_the_command_line(word, options):
    config = compose_run(translate_flags([f"model.lora_options{word}"]))
    assert OmegaConf.to_container(config.model.lora_options) == options


def test_a_mapping_that_is_no_yaml_is_a_sentence():
    with pytest.raises(ValueError, match=r"model\.lora_options=\{\^a: \[\} is no YAML: "):
        compose_run(translate_flags(["model.lora_options={^a:[}"]))


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (ValueError("a.png is cut: fetch it again"), "a.png is cut: fetch it again"),
        (ValueError("two\nlines, ValueError: both"), "two lines, ValueError: both"),
        (FileNotFoundError(2, "No such file", "a.png"), "[Errno 2] No such file: 'a.png'"),
        (ValueError(), "ValueError"),
        (type("Own", (ValueError,), {"__module__": "somebody", "__qualname__": "f.<locals>.Own"})("own"), "own"),
        (UnicodeDecodeError("utf-8", b"x", 0, 1, "bad"), "'utf-8' codec can't decode byte 0x78 in position 0: bad"),
        (KeyError("a"), "'a'"),
    ],
    ids=repr,
)
def test_an_error_in_a_process_that_loads_data_is_its_own_sentence(error, sentence):
    try:
        try:
            raise OSError("its cause: ValueError: no")
        except OSError as cause:
            raise error from cause
    except Exception:
        wrapped = ExceptionWrapper(where="in DataLoader worker process 0")
    with pytest.raises(Exception, match="Original Traceback") as raised:
        wrapped.reraise()
    assert one_sentence(raised.value) == sentence


TOY = [
    "data=toy_streets",
    "data.num_train=4",
    "data.num_val=2",
    "data.size=[64,128]",
    "data.batch_size=2",
    "model=tiny",
]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["model.num_classes=20"], "model.num_classes 20: the data set has 19 classes"),
        (["model.use_lora=true", "model.lora_target_modules=[nothing]"], "nothing"),
        (
            ["model.warmup_steps=[500,1000]", "trainer.max_epochs=2"],
            "500 \\+ 1000 do not end within the run of 4 steps",
        ),
        (["model.pretrained=true"], "ckpt_path=FILE pretrained=false"),
        (["data.batch_size=16"], "batch_size 16"),
        (["trunk_cache=true"], "trunk_cache: .* trains"),
    ],
)
def test_a_mistake_that_shows_only_with_data_is_one_sentence_too(tmp_path, toy_cache, arguments, sentence):
    result = run(*TOY, f"data.root={toy_cache}", "model.img_size=[64,64]", *arguments, f"output_dir={tmp_path}")
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == 1 and len(errors) == 1 and re.search(sentence, errors[0]), result.stderr
    assert "Traceback" not in result.stderr and errors[0].removeprefix("error: ") not in result.stdout  # said once


def test_the_traceback_is_there_for_who_asks(tmp_path):
    result = run(
        "data.root=/x", "model.use_lora=true", "model.lora_rank=0", f"output_dir={tmp_path}", HYDRA_FULL_ERROR="1"
    )
    assert result.returncode == 1 and "Traceback" in result.stderr and "rank 0" in result.stderr


def test_the_home_folder_is_meant_by_a_tilde_in_output_dir_however_it_is_written(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    for words in (["output_dir=~/runs"], ["output_dir='~/runs'"], ["--output_dir", "~/runs"], ["--output_dir=~/runs"]):
        (word,) = translate_flags(words)
        assert word.replace("'", "") == "output_dir=/home/me/runs"


def test_mappings_that_go_to_a_library_take_new_keys():
    words = ["model.backbone_kwargs={drop_path_rate: 0.1}", "model.lora_options.use_dora=true", "model.lr=1"]
    assert translate_flags(words) == [f"++{words[0]}", f"++{words[1]}", words[2]]
    with initialize_config_dir(str(ROOT / "configs"), version_base=None):
        cfg = compose("cityscapes", ["model=tiny", *translate_flags(words[:1])])
    assert dict(cfg.model.backbone_kwargs) == {"embed_dim": 192, "depth": 8, "num_heads": 3, "drop_path_rate": 0.1}


def test_a_wrong_key_within_a_mapping_is_named():
    with initialize_config_dir(str(ROOT / "configs"), version_base=None), pytest.raises(Exception) as error:
        compose("cityscapes", ["data={bach_size: 2}"])
    assert one_sentence(error.value).startswith("data.bach_size is not in the configuration; did you mean batch_size")


ODD = "a=1, [b] {c} it's (d) größe"  # a folder's name, as people have them


@given(st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1).filter(lambda text: "${" not in text))
def test_hydra_reads_any_path_as_it_was_typed(path):
    word = quote_path(f"data.root={path}")
    if path == "null" or unquoted(path) != path:  # the user has said how to read it
        assert word == f"data.root={path}"
        return
    value = OverridesParser.create().parse_override(word).value()
    assert getattr(value, "text", value) == path
    assert quote_path(word) == word and unquoted(word.partition("=")[2]) == path


def test_sweeps_over_paths_interpolations_and_other_keys_are_left_as_they_are():
    words = ["model.ckpt_path=a.ckpt,b.ckpt", "resume=null", "output_dir=${oc.env:HOME}/x", "model.lr=1e-3"]
    assert translate_flags([*words, "--multirun"])[1:] == words
    assert translate_flags(["model.ckpt_path=a.ckpt,b.ckpt"]) == ["model.ckpt_path='a.ckpt,b.ckpt'"]


def test_folders_with_odd_names_train_and_are_evaluated(toy_run, toy_cache, tmp_path):
    run_folder, data = tmp_path / ODD / "run", tmp_path / ODD / "data"
    shutil.copytree(toy_run[0], run_folder)
    shutil.copytree(toy_cache, data)
    checkpoint = run_folder / "checkpoints" / "epoch=1-step=16.ckpt"  # Lightning's own way of naming one
    shutil.move(run_folder / "checkpoints" / "last.ckpt", checkpoint)
    words = [*TOY_DATA, f"data.root={data}", "model=tiny", *TOY_MODEL, "variant=none", f"model.ckpt_path={checkpoint}"]
    result = run(*words, "data.batch_size=4", f"output_dir={tmp_path / ODD / 'none'}")
    assert result.returncode == 0, result.stderr[-2000:]
    result = run_script("evaluate.py", run_folder, f"data.root={data}")
    assert result.returncode == 0, result.stderr[-2000:]
    result = run_script("evaluate.py", run_folder / "model", *TOY_DATA, f"data.root={data}", "--output", tmp_path / ODD)
    assert result.returncode == 0, result.stderr[-2000:]
    facts, _ = parse_matrix([f"output_dir={tmp_path / ODD}", f"data.root={data}"], "cityscapes")
    assert facts["folder"] == str(tmp_path / ODD) and facts["overrides"] == [quote_path(f"data.root={data}")]


def test_null_is_no_folder(tmp_path):
    facts, _ = parse_matrix(["output_dir=null", "anomaly_root=null"], "cityscapes")
    assert facts["anomaly_root"] is None and facts["folder"] == "outputs/compare/cityscapes_vit_large"
    lines = "data: {_target_: eomt.data.folder.folder, classes: c, images: i, masks: m, val_images: v, val_masks: v}"
    (tmp_path / "config.yaml").write_text(lines)
    with pytest.raises(FileNotFoundError, match="c is not there"):  # and val_images no folder named null
        data_of_run(tmp_path, ["data.val_images=null", "data.val_masks=null"])


def test_further_configurations_may_lie_in_a_folder_with_an_odd_name(tmp_path):
    (tmp_path / ODD / "variant").mkdir(parents=True)
    (tmp_path / ODD / "variant" / "mine.yaml").write_text("# @package _global_\nseed: 7\n")
    assert compose_run(["variant=mine", "data.root=/x"], folder=tmp_path / ODD).seed == 7


@pytest.mark.parametrize(
    "text",
    [
        "experiment=camvid_day data.root=/d",
        "[experiment=camvid_day, data.root=/d]",
        "experiment=camvid_day,data.root=/d",
        "camvid_day data.root=/d",
        "'experiment=camvid_day data.root=/d'",
    ],
)
def test_the_source_of_a_matrix_may_be_written_in_several_ways(text):
    assert read_source(text) == ["experiment=camvid_day", "data.root=/d"]
    assert parse_matrix([f"source={text}"], "cityscapes")[0]["source"] == ["experiment=camvid_day", "data.root=/d"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["source=experiment=camvid_dey"],
            'source="experiment=camvid_dey": experiment=camvid_dey is not there; did you',
        ),
        (
            ["source=experiment=camvid_day", "data.root=/d"],
            'source="experiment=camvid_day": data.root is required: .*; what describes this data stands within',
        ),
        (
            ["source=experiment=camvid_day data.root=/d"],
            'source="experiment=camvid_day data.root=/d": CamVid needs .*/d',
        ),
        (["source.experiment=camvid_day"], "source.experiment=camvid_day: write source="),
    ],
)
def test_a_source_that_cannot_be_had_is_told_before_any_data_is_read(words, sentence, monkeypatch):
    monkeypatch.setattr(matrix, "build_data", lambda *_: pytest.fail("data was read"))
    with pytest.raises(ValueError, match=sentence):
        facts = parse_matrix(["experiment=camvid_day", "variants=[head]", *words], "cityscapes")[0]
        matrix.check_matrix(facts, lambda config: None)


def test_lists_in_a_source_stay_whole_and_what_is_no_data_set_is_refused():
    assert read_source("data=camvid data.sequences=[a,b]") == ["data=camvid", "data.sequences=[a,b]"]
    assert read_source("toy_streets") == ["data=toy_streets"] and read_source("") == []
    with pytest.raises(ValueError, match=r"day is no data set or experiment; write source="):
        read_source("day data.root=/d")
