"""Publishing: what is sent opens elsewhere, its card says what it is, and nothing of the machine is told."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, TINY
from peft import PeftConfig
from PIL import Image
from safetensors.torch import save_file

from eomt.comparison.card_scores import known_scores
from eomt.exchange.model_card import OF_THE_MACHINE, TOLD, cleaned_command
from eomt.exchange.publishing import FILES, refuse_paths, stage
from eomt.settings import hub
from eomt.settings.compose import compose_run
from eomt.training.mask_classification_semantic import MaskClassificationSemantic

NAMES = ["road", "side|walk", *(f"class {k}" for k in range(2, 19))]
SECRETS = ("hf_abcdef", "wandb", "/home/", "my-private-project")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder as training and scripts/evaluate.py leave it, with an adapter on a network beside it."""
    root = tmp_path_factory.mktemp("runs")
    torch.manual_seed(0)
    MaskClassificationSemantic(**TINY).save_pretrained(root / "source" / "model")
    settings = {"use_lora": True, "class_names": NAMES, "ckpt_path": str(root / "source" / "model")}
    module = MaskClassificationSemantic(**{**TINY, **settings})
    own = module.save_pretrained(root / "lora" / "adapter")
    summary = {
        "schema_version": 1,
        "status": "finished",
        "miou": 0.25,
        "class_iou": {name: 0.25 if k else None for k, name in enumerate(NAMES)},
        "artefact": "adapter",
        "artefact_id": own,
        "steps": 12,
        "seed": 3,
        "trainable_parameters": 1234,
        "data": {"train": "f" * 64, "train_images": 8, "val": "e" * 64, "val_images": 3},
        "versions": {"torch": "2.14"},
        "git_commit": "0" * 40,
        "command": [
            "/home/me/eomt/train_with_lora.py", "experiment=toy_night", "data.root=/home/me/data", "model.lora_rank=8",
            f"model.ckpt_path={root}/source/model", "logger=wandb", "logger.wandb.project=my-private-project",
            "+trainer.api_key=hf_abcdef", "output_dir=/home/me/out", "--config-name", "cityscapes_lora",
            "model.backbone_kwargs={pretrained_cfg_overlay: {file: /home/me/x.bin}}",
        ],
    }  # fmt: skip
    (root / "lora" / "summary.json").write_text(json.dumps(summary))
    config = {"data": {"_target_": "eomt.data.toy_streets.toy_streets", "root": "/home/me/data"}}
    (root / "lora" / "config.yaml").write_text(yaml.safe_dump(config))
    return root / "lora"


def evaluate(run, folder, own):
    """What scripts/evaluate.py leaves: half of the pixels of every class are right."""
    images, k = 12, len(NAMES)
    confusion = np.stack(
        [np.eye(k, dtype=np.int64) * (10 + i) + np.roll(np.eye(k, dtype=np.int64), 1, 0) * 10 for i in range(images)]
    )
    (folder / "evaluation").mkdir(parents=True)
    np.savez_compressed(folder / "evaluation" / "night.npz", confusion=confusion)
    facts = {
        "schema_version": 1,
        "domain": "night",
        "miou": 0.5,
        "class_iou": dict.fromkeys(NAMES, 0.5),
        "classes": NAMES,
    }
    facts |= {"images": [f"i{k}" for k in range(images)], "artefact_id": own}
    (folder / "evaluation" / "night.json").write_text(json.dumps(facts))


def outputs(module, size=(64, 128)):
    image = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), module.eval().network.deployed():
        return torch.cat([part.flatten() for parts in module.network(image) for part in parts])


def staged(run, draft, **options):
    draft.mkdir()
    stage(run / "adapter", draft, "user/name", known_scores(run / "adapter", "toy_streets"), **options)
    card = (draft / "README.md").read_text()
    return card, yaml.safe_load(card.split("---")[1])


def test_a_command_is_told_without_what_is_of_its_machine(run):
    words = json.loads((run / "summary.json").read_text())["command"]
    assert cleaned_command(words) == (
        "train_with_lora.py experiment=toy_night data.root=PLACE model.lora_rank=8 model.ckpt_path=PLACE --config-name "
        "cityscapes_lora model.backbone_kwargs=PLACE"
    )
    kept = ["train_with_lora.py", "model.ckpt_path=hf://user/name@v1/model.safetensors", "trainer.max_epochs=3"]
    assert cleaned_command(kept) == " ".join(kept)
    assert cleaned_command(["x.py", "data.root=data", "data.images=a*.png", "model.x=${oc.env:KEY}"]) == (
        "x.py data.root=PLACE data.images=PLACE model.x=PLACE"
    )


def test_a_command_keeps_every_part_of_the_recipe_and_says_where_others_were_left_out():
    recipe = [
        "data/cut_paste=toy",
        "callbacks=ema",
        "+callbacks.ema.decay=0.99",
        "allow_any_target=true",
    ]
    assert cleaned_command(["train_with_lora.py", *recipe, "logger=wandb"]) == " ".join(["train_with_lora.py", *recipe])
    assert cleaned_command(["train_with_lora.py", "seed=1", "optimizer=x"]) == "train_with_lora.py seed=1 …"
    flags = ["--config", "my/own.yaml", "--use_lora", "--lora_rank=8", "--lora_target_modules", "qkv", "proj"]
    flags += ["--images", "photos", "--img_size", "64", "128", "--use_wandb", "--output_dir", "out", "--multirun"]
    assert cleaned_command(["train_with_lora.py", *flags]) == (
        "train_with_lora.py --config PLACE --use_lora true --lora_rank 8 --lora_target_modules qkv proj --images PLACE "
        "--img_size 64 128"
    )


def test_every_setting_of_a_run_is_of_the_recipe_or_of_its_machine():
    config = compose_run(["experiment=anomalies", "data.root=x"])
    groups = {folder.name for folder in (ROOT / "configs").iterdir() if folder.is_dir()}
    assert not {*config, *groups} - {*TOLD, *OF_THE_MACHINE}


@pytest.mark.parametrize("name", ["ckpt_path", "backbone_weights"])
def test_the_line_of_code_on_a_card_works_with_the_base_put_in(name, tmp_path):
    settings = TINY | {"img_size": [64, 64]}  # a plain backbone's positions are taken to be square
    network, base = MaskClassificationSemantic(**settings), tmp_path / "plain.safetensors"
    if name == "ckpt_path":
        network.save_pretrained(base := tmp_path / "base")
    else:
        save_file({key: t.contiguous() for key, t in network.backbone.state_dict().items()}, base)
    module = MaskClassificationSemantic(**{**settings, "use_lora": True, name: str(base)})
    module.save_pretrained(tmp_path / "run" / "adapter")
    card, _ = staged(tmp_path / "run", tmp_path / "draft")
    (line,) = re.findall(r"^module = (.*)$", card, re.MULTILINE)
    line = line.replace("user/name", str(tmp_path / "draft")).replace("BASE", str(base))
    opened = eval(line, {"MaskClassificationSemantic": MaskClassificationSemantic})
    assert torch.equal(outputs(opened, (64, 64)), outputs(module, (64, 64)))


@pytest.mark.parametrize("text", ["user/rootnet", "me/root", "car /truck", "https://a.b/c", "hf://user/name", "and/or"])
def test_what_only_looks_like_a_path_of_this_machine_is_published(text, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/root")
    (tmp_path / "README.md").write_text(f'x = open("{text}")')
    refuse_paths(tmp_path)


PRIVATE = [
    "/home/me",
    "`/data/x`",
    "['/data/x']",
    "a (/x/y)",
    "~/x",
    "C:/data/x",
    "C:\\data",
    "\\\\server\\share",
    "{here}",
]


@pytest.mark.parametrize("text", PRIVATE)
def test_a_path_of_a_machine_is_not_published_however_it_is_written(text, tmp_path):
    here = f"/{Path(__file__).parts[1]}"  # one folder alone, which is there
    (tmp_path / "README.md").write_text(f"see {text.format(here=here)}")
    with pytest.raises(ValueError, match=r"README.md would tell the world of"):
        refuse_paths(tmp_path)


def test_what_is_published_opens_on_its_base_and_tells_no_path(run, tmp_path):
    card, _ = staged(run, tmp_path / "draft")
    sent = {file.name: file.read_bytes() for file in (tmp_path / "draft").iterdir()}
    assert sent.keys() <= set(FILES)
    for secret in (*SECRETS, str(run.parent), str(Path.home())):
        assert not [name for name, content in sent.items() if secret.encode() in content], secret
    base = str(run.parent / "source" / "model")
    opened = MaskClassificationSemantic.from_pretrained(tmp_path / "draft", base)
    assert torch.equal(outputs(opened), outputs(MaskClassificationSemantic.from_pretrained(run / "adapter")))
    with pytest.raises(FileNotFoundError, match="give the place of these weights with ckpt_path"):
        MaskClassificationSemantic.from_pretrained(tmp_path / "draft")
    assert 'from_pretrained("user/name", ckpt_path="BASE")' in card


def test_the_card_says_base_data_classes_settings_score_and_licence(run, tmp_path):
    card, top = staged(run, tmp_path / "draft", licence="mit")
    config = json.loads((run / "adapter" / "eomt_config.json").read_text())
    for words in (
        "`model`, a file that is not published with it",
        config["base_weights"]["stored"],
        config["artefact_id"],
        "side\\|walk",
        "| rank, alpha | 16, 32 |",
        "`attn.qkv`, `attn.proj` in all blocks",
        "8 to train, 3 to validate",
        "f" * 64,
        "| seed | 3 |",
        "`train_with_lora.py experiment=toy_night",
        "25.00 % mIoU on toy_streets, 3 images; no interval is known",
        "| road | absent |",
        "is `mit`",
    ):
        assert words in card, words
    assert top["license"] == "mit" and top["library_name"] == "peft" and top["pipeline_tag"] == "image-segmentation"
    assert {"eomt", "semantic-segmentation", "lora"} <= set(top["tags"])
    (result,) = top["model-index"][0]["results"]
    assert result["metrics"][0]["value"] == 0.25 and "base_model" not in top
    assert huggingface_hub.ModelCard(card).data.eval_results[0].metric_type == "mean_iou"  # as the hub reads it
    assert Image.open(tmp_path / "draft" / "classes.png").format == "PNG" and "![classes.png](classes.png)" in card


def test_the_score_of_a_training_that_validated_on_some_of_the_images_says_so(run, tmp_path):
    shutil.copytree(run, tmp_path / "lora")
    file = tmp_path / "lora" / "config.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | {"trainer": {"limit_val_batches": 2}}))
    card, _ = staged(tmp_path / "lora", tmp_path / "draft")
    assert "25.00 % mIoU on toy_streets, some of 3 images; no interval is known" in card


def test_a_network_without_a_run_as_a_converted_one_is_not_said_to_be_trained_here_or_from_random_weights(
    run, tmp_path
):
    (tmp_path / "draft").mkdir()
    stage(run.parent / "source" / "model", tmp_path / "draft", "user/name")
    card = (tmp_path / "draft" / "README.md").read_text()
    assert "saved by EoMT-LoRA" in card and "trained with" not in card and "random weights" not in card


def test_an_evaluation_of_this_very_network_gives_the_score_with_its_interval(run, tmp_path):
    shutil.copytree(run, tmp_path / "lora")
    own = json.loads((run / "adapter" / "eomt_config.json").read_text())["artefact_id"]
    evaluate(run, tmp_path / "lora", own)
    (score,) = known_scores(tmp_path / "lora" / "adapter")
    low, high = score.interval
    assert score.data == "night" and score.miou == 0.5 and 0 < low < high < 1 and score.units == "12 images"
    card, _ = staged(tmp_path / "lora", tmp_path / "draft")
    assert f"50.00 % mIoU ({100 * low:.2f} to {100 * high:.2f}) on night, 12 images" in card
    facts = tmp_path / "lora" / "evaluation" / "night.json"
    facts.write_text(facts.read_text().replace(own, "other"))
    assert [score.data for score in known_scores(tmp_path / "lora" / "adapter", "toy_streets")] == ["toy_streets"]


def test_a_base_on_the_hub_stands_in_the_settings_in_pefts_file_and_at_the_top_of_the_card(run, tmp_path):
    commit = "c" * 40
    card, top = staged(run, tmp_path / "draft", base=f"hf://user/base@{commit}/model.safetensors")
    known = PeftConfig.from_pretrained(str(tmp_path / "draft"))
    assert (known.base_model_name_or_path, known.revision) == ("user/base", commit)
    assert top["base_model"] == "user/base" and top["base_model_relation"] == "adapter"
    assert 'from_pretrained("user/name")' in card
    init = json.loads((tmp_path / "draft" / "eomt_config.json").read_text())["init"]
    assert init["ckpt_path"] == f"hf://user/base@{commit}/model.safetensors"


def test_a_whole_network_is_published_with_a_card_too(run, tmp_path):
    (tmp_path / "draft").mkdir()
    stage(run.parent / "source" / "model", tmp_path / "draft", "user/name")
    card = (tmp_path / "draft" / "README.md").read_text()
    assert "A EoMT" not in card and "An [EoMT]" in card and "library_name: pytorch" in card and "rank" not in card
    assert {file.name for file in (tmp_path / "draft").iterdir()} == {
        "README.md",
        "eomt_config.json",
        "model.safetensors",
    }
    assert 'from_pretrained("user/name")' in card and "has not been chosen yet" in card
    with pytest.raises(ValueError, match=r"--base .* is for adapters"):
        stage(run.parent / "source" / "model", tmp_path / "draft", "user/name", base="hf://user/base")


def test_a_folder_that_is_not_what_was_saved_or_not_what_its_run_tells_of_is_not_published(run, tmp_path):
    shutil.copytree(run, tmp_path / "lora")
    file = tmp_path / "lora" / "adapter" / "eomt_config.json"
    file.write_text(file.read_text().replace('"lora_rank": 16', '"lora_rank": 8'))
    with pytest.raises(ValueError, match="no longer what was saved"):
        staged(tmp_path / "lora", tmp_path / "draft")
    module = MaskClassificationSemantic.from_pretrained(run / "adapter")
    with torch.no_grad():
        module.network.q.weight += 1
    module.save_pretrained(tmp_path / "lora" / "adapter")
    with pytest.raises(ValueError, match="is another network"):
        staged(tmp_path / "lora", tmp_path / "other")


@pytest.mark.parametrize("text", ["data in /home/me/data", "/teamspace/studios/x", "C:\\data\\x", "~/data/x"])
def test_a_path_in_any_text_to_be_published_stops_it(tmp_path, text):
    (tmp_path / "README.md").write_text("hf://user/name@v1/file, https://www.tue-mps.org/eomt/, a/b, `attn.qkv`/x")
    refuse_paths(tmp_path)
    (tmp_path / "eomt_config.json").write_text(json.dumps({"class_names": [text]}))
    with pytest.raises(ValueError, match=r"eomt_config\.json would tell the world"):
        refuse_paths(tmp_path)


def test_a_picture_of_ones_own_is_written_anew_without_its_notes(run, tmp_path):
    image = Image.new("RGB", (8, 8))
    exif = image.getexif()
    exif[0x010E] = "taken at home"
    image.save(tmp_path / "own.jpg", exif=exif)
    staged(run, tmp_path / "draft", picture=tmp_path / "own.jpg")
    assert b"taken at home" in (tmp_path / "own.jpg").read_bytes()
    assert b"taken at home" not in (tmp_path / "draft" / "classes.png").read_bytes()


@pytest.fixture
def account(monkeypatch):
    """The hub's client, which keeps what it is told, and a login."""
    told = SimpleNamespace(calls=[], token="hf_abcdef")

    class Client:
        def create_repo(self, repo, private=None, exist_ok=False):
            told.calls.append(("repo", repo, private, exist_ok))

        def upload_folder(self, repo_id, folder_path, **options):
            told.files = {file.name: file.read_bytes() for file in Path(folder_path).iterdir()}
            told.calls.append(("upload", repo_id, options))
            return SimpleNamespace(oid="d" * 40)

    monkeypatch.setattr(huggingface_hub, "HfApi", Client)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: told.token)
    hub._commit.cache_clear()
    return told


def test_a_dry_run_shows_card_and_files_and_asks_nobody(run, account, call_script, capsys, monkeypatch):
    account.token = None
    monkeypatch.setattr(huggingface_hub, "HfApi", None)
    code, error = call_script("publish.py", run, "user/name", "--dry-run")
    assert code == 0 and "give --base hf://user/name/file" in error and "--licence" in error


def test_publishing_sends_the_files_with_the_users_login_and_says_the_commit(run, account, call_script):
    code, error = call_script("publish.py", run / "adapter", "user/name", "--licence", "mit", "--private")
    assert code == 0, error
    assert account.calls[0] == ("repo", "user/name", True, True) and account.calls[1][1] == "user/name"
    assert "token" not in account.calls[1][2] and account.files.keys() <= set(FILES)
    assert b"hf_abcdef" not in b"".join(account.files.values())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["name"], "user/name is meant"),
        (["user/name"], "hf auth login"),
        (["user/name", "--base", "/data/base"], "hf://user/name@revision/file"),
    ],
)
def test_what_cannot_be_published_is_one_sentence(run, account, call_script, words, message):
    account.token = None
    code, error = call_script("publish.py", run / "adapter", *words)
    assert code == 1 and message in error and "Traceback" not in error and not account.calls
