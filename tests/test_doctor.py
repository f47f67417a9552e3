"""scripts/doctor.py: a sound run passes every check, and each planted fault is found."""

import json
import os
import shutil
import subprocess
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import warm
import yaml
from conftest import ROOT, run_script
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torchvision.transforms.functional import pil_to_tensor

from eomt.anomaly import evaluation
from eomt.anomaly.datasets import AnomalyDataset
from eomt.anomaly.evaluation import LogitCache
from eomt.anomaly.toy_anomalies import write_toy_anomalies
from eomt.data.folder import folder
from eomt.diagnosis.checks import (
    CLIPPED,
    Channels,
    check_adapter_updates,
    check_anomaly_scores,
    check_gradients,
    check_label_indices,
    check_mask_annealing,
    check_normalisation,
    check_trained_weights,
)
from eomt.diagnosis.doctor import diagnose
from eomt.diagnosis.pixels import share_clipped, spread
from eomt.models.vit import ViT
from eomt.toys.scene import draw_scene

run = partial(run_script, "doctor.py")
CLASSES = [{"name": name, "color": [90 * i, 40, 200], "ids": [i]} for i, name in enumerate(("road", "wall", "sky"))]
MODEL = ["model=tiny", "model.img_size=[32,32]", "model.backbone_kwargs={embed_dim:32,depth:3,num_heads:2}"]
MODEL += ["model.num_blocks=2", "model.num_q=10", "model.num_points=64", "callbacks.samples.every_n_epochs=0"]
IMAGENET = Channels((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
SCORE = {"score": "rba", "temperature": 1.0, "auprc": 0.4, "fpr95": 0.3, "error": 0.0, "anomalous": 50, "valid": 1000}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Three bands in every picture, so that no class is ever absent."""
    root = tmp_path_factory.mktemp("bands")
    (root / "classes.yaml").write_text(yaml.safe_dump({"classes": CLASSES}))
    bands = np.repeat(np.array([[0], [1], [2]], np.uint8), 16, axis=0).repeat(48, axis=1)
    for part in ("images", "masks"):
        (root / part).mkdir()
    for i in range(8):
        noise = np.random.default_rng(i).integers(0, 150, (*bands.shape, 3))
        Image.fromarray((noise + 50 * bands[..., None]).astype(np.uint8)).save(root / "images" / f"{i}.png")
        Image.fromarray(bands).save(root / "masks" / f"{i}.png")
    return root


def train(root, output, *arguments):
    data = [f"data.{key}={root / key}" for key in ("images", "masks")] + [f"data.classes={root / 'classes.yaml'}"]
    command = [warm.python(), ROOT / "train_with_lora.py", "data=folder", *data, *MODEL, "data.batch_size=2"]
    command += ["data.num_workers=0", "trainer.max_epochs=2", "model.lr=1e-3", f"output_dir={output}", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, timeout=600)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    return output


@pytest.fixture(scope="module")
def full(root, tmp_path_factory):
    return train(root, tmp_path_factory.mktemp("full"))


@pytest.fixture(scope="module")
def lora(root, full, tmp_path_factory):
    return train(root, tmp_path_factory.mktemp("lora"), "--use_lora", f"model.ckpt_path={full}/model")


@pytest.fixture(scope="module")
def tuned(root, full, tmp_path_factory):
    """All weights trained on, from those of a run."""
    return train(root, tmp_path_factory.mktemp("tuned"), f"model.ckpt_path={full}/model")


@pytest.fixture
def copy(full, lora, tuned, tmp_path):
    """A copy of a run, in which a test plants a fault."""

    def copied(name):
        shutil.copytree({"full": full, "lora": lora, "tuned": tuned}[name], tmp_path / name)
        return tmp_path / name

    return copied


@pytest.fixture
def data(root):
    paths = {key: str(root / key) for key in ("images", "masks")} | {"classes": str(root / "classes.yaml")}
    return partial(folder, **paths, img_size=(32, 32), batch_size=1, num_workers=0)


def edit_json(path, edit):
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def edit_settings(path, **settings):
    edit_json(path / "eomt_config.json", lambda config: config["init"].update(settings))


def edit_config(path, part, **settings):
    config = yaml.safe_load((path / "config.yaml").read_text())
    config[part].update(settings)
    (path / "config.yaml").write_text(yaml.safe_dump(config))


def edit_tensors(path, edit):
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata)


def edit_last(path, edit):
    content = torch.load(path / "checkpoints" / "last.ckpt", weights_only=True)
    edit(content)
    torch.save(content, path / "checkpoints" / "last.ckpt")


def write_scores(path, *results):
    (path / "anomaly").mkdir(exist_ok=True)
    facts = {"schema_version": 1, "benchmark": "toy", "title": "Toy", "results": list(results)}
    (path / "anomaly" / "toy.json").write_text(json.dumps(facts))


def failed(path, data=None):
    """Evidence by check that fails."""
    return {name: f.evidence for name, f in diagnose(path, path, data).items() if f.passed is False}


def only(path, check, data=None):
    """The evidence of this check, the only one that fails."""
    found = failed(path, data)
    assert list(found) == [check], found
    return found[check]


def test_a_sound_lora_run_passes_every_check(copy, data):
    path = copy("lora")
    write_scores(path, SCORE)
    findings = diagnose(path, path, data())
    assert {name: f.evidence for name, f in findings.items() if not f.passed} == {}
    assert len(findings) == 12
    evidence = {name: f.evidence for name, f in findings.items()}
    assert (
        evidence["adapter updates"].startswith("6 layers, norms ") and "6 training crops" in evidence["normalisation"]
    )
    assert "labels in the data: 0..2" in evidence["label indices"]
    assert "num_blocks 2, num_classes 3, num_q 10" in evidence["sizes"] and "config.yaml" in evidence["sizes"]


def test_a_sound_full_run_passes_every_check_that_has_something_to_look_at(full, data):
    findings = diagnose(full, full, data())
    assert not any(f.passed is False for f in findings.values()), findings
    without = {name: f.evidence for name, f in findings.items() if f.passed is None}
    assert without.keys() == {"adapter updates", "lora audit", "trained weights", "anomaly scores"}
    assert "random weights" in without["trained weights"] and without["adapter updates"] == "no adapter"
    assert "faded out at step 5 of 6" in findings["mask annealing"].evidence


def test_a_sound_run_that_freezes_a_head_passes_from_its_folder_and_its_checkpoint(root, full, tmp_path):
    path = train(root, tmp_path / "run", "--use_lora", f"model.ckpt_path={full}/model", "model.freeze=[mask_head]")
    for artefact in (path, path / "checkpoints" / "last.ckpt"):  # which leaves the frozen head out
        findings = diagnose(artefact, path)
        assert not any(f.passed is False for f in findings.values()), findings
    assert "6 frozen ones have not" in diagnose(path, path)["trained weights"].evidence


@pytest.mark.parametrize("file", ["best.ckpt", "last.ckpt"])
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_sound_lightning_checkpoint_passes(full, lora, kind, file):
    path = {"full": full, "lora": lora}[kind]
    findings = diagnose(path / "checkpoints" / file, path)
    assert not any(f.passed is False for f in findings.values()), findings
    assert findings["checkpoint keys"].passed


def test_a_model_without_its_run_is_not_checked_for_what_only_a_run_tells(full, tmp_path):
    shutil.copytree(full / "model", tmp_path / "model")
    findings = diagnose(tmp_path / "model", tmp_path / "model")
    assert {name for name, f in findings.items() if f.passed} == {
        "checkpoint keys",
        "sizes",
        "normalisation",
        "label indices",
    }
    assert not any(f.passed is False for f in findings.values())
    assert findings["gradients"].evidence == "no summary.json of a run"


def test_weights_without_a_configuration_are_looked_at_as_far_as_they_tell(full, tmp_path):
    shutil.copy(full / "model" / "model.safetensors", tmp_path / "model.safetensors")
    findings = diagnose(tmp_path / "model.safetensors", tmp_path)
    assert findings["sizes"].passed is None and findings["sizes"].evidence == "only the weights tell their sizes"
    assert findings["normalisation"].passed is None
    assert not any(f.passed is False for f in findings.values())


# Faults in saved artefacts and run folders


def test_an_adapter_with_a_zero_update_is_found(copy):
    path = copy("lora")

    def forget(tensors):
        for key in tensors:
            if "blocks.1.attn.qkv.lora_B" in key:
                tensors[key].zero_()

    edit_tensors(path / "adapter" / "adapter_model.safetensors", forget)
    assert only(path, "adapter updates") == "1 of 6 updates have the norm 0: blocks.1.attn.qkv"


def test_a_failed_audit_is_found(copy):
    path = copy("lora")
    edit_json(path / "summary.json", lambda s: s["lora_audit"]["updates_nonzero"].update(passed=False, detail="zero"))
    assert "updates_nonzero: zero" in only(path, "lora audit")


def test_a_run_that_failed_before_it_saved_anything_shows_its_audit(copy):
    path = copy("lora")
    shutil.rmtree(path / "adapter")
    edit_json(path / "summary.json", lambda s: s["lora_audit"]["updates_nonzero"].update(passed=False, detail="zero"))
    assert only(path, "lora audit")


def test_fewer_trained_parameters_than_asked_for_are_found(copy):
    path = copy("full")
    edit_json(path / "summary.json", lambda s: s.update(trainable_parameters=s["trainable_parameters"] - 32))
    assert "the settings ask for" in only(path, "trainable parameters")


def test_a_head_that_is_still_that_of_the_start_is_found(copy, full):
    path, start = copy("lora"), load_file(full / "model" / "model.safetensors")
    key = "network.q.weight"
    edit_tensors(path / "adapter" / "heads.safetensors", lambda tensors: tensors.update({key: start[key]}))
    assert only(path, "trained weights") == "1 tensors should train and are still those of the start: q.weight"


def test_a_part_that_should_be_frozen_and_has_changed_is_found(copy):
    path = copy("lora")
    edit_settings(path / "adapter", freeze=["mask_head"])
    found = failed(path)
    assert "6 tensors should be frozen and have changed: mask_head.0." in found["trained weights"]
    assert "trainable parameters" in found and "held 31 tensors, 25 should train" in found["gradients"]


def test_a_parameter_without_a_gradient_is_found_by_name(copy):
    path = copy("lora")

    def silence(content):
        adam = content["optimizer_states"][0]["state"]
        for moment in ("exp_avg", "exp_avg_sq"):
            adam[0][moment].zero_()

    edit_last(path, silence)
    assert "1 of 31 tensors had no finite gradient: encoder.backbone.blocks.0.attn.qkv.lora_A" in only(
        path, "gradients"
    )


def test_a_parameter_that_the_optimiser_never_held_is_found(copy):
    path = copy("full")
    edit_last(path, lambda content: content["optimizer_states"][0]["param_groups"][0]["params"].pop())
    assert "tensors, " in only(path, "gradients")


@pytest.mark.parametrize("name", ["full", "lora"])
def test_keys_that_loading_passes_over_are_found(copy, name):
    path = copy(name)
    file = path / ("model/model.safetensors" if name == "full" else "adapter/heads.safetensors")

    def rename(tensors):
        tensors["network.mask_head.9.weight"] = tensors.pop("network.mask_head.0.weight")

    edit_tensors(file, rename)
    evidence = only(path, "checkpoint keys")
    assert "1 of " in evidence and "keys ignored: mask_head.9.weight" in evidence
    assert "keys missing: mask_head.0.weight" in evidence


def test_keys_of_the_start_weights_that_were_passed_over_are_found(copy, full, tmp_path):
    path = copy("lora")
    shutil.copytree(full / "model", tmp_path / "start")
    extra = {"network.mask_head.9.weight": torch.zeros(2)}
    edit_tensors(tmp_path / "start" / "model.safetensors", lambda tensors: tensors.update(extra))
    edit_settings(path / "adapter", ckpt_path=str(tmp_path / "start"))
    assert "the start weights: 1 of " in only(path, "checkpoint keys")


def test_half_an_adapter_is_found(copy):
    path = copy("lora")
    key = "base_model.model.blocks.0.attn.proj.lora_B.weight"
    edit_tensors(path / "adapter" / "adapter_model.safetensors", lambda tensors: tensors.pop(key))
    found = failed(path)
    assert found["adapter updates"] == "the adapter holds lora_A of 6 layers and lora_B of 5, 5 in both"
    assert "keys missing: blocks.0.attn.proj.lora_B.weight" in found["checkpoint keys"]


@pytest.mark.parametrize("name", ["num_blocks", "num_q", "num_classes"])
def test_a_configuration_of_other_sizes_than_the_weights_is_found(copy, name):
    path = copy("full")
    edit_settings(path / "model", **{name: 1, "class_names": None, "class_colors": None})
    evidence = failed(path)["sizes"]
    assert f"{name} is " in evidence and "in the weights, 1 in their configuration" in evidence


def test_a_run_that_was_configured_otherwise_than_its_weights_is_found(copy):
    path = copy("full")
    edit_config(path, "model", num_q=12)
    assert "num_q is 10 in the weights, 10 in their configuration, 12 in config.yaml" in only(path, "sizes")


@pytest.mark.parametrize(
    ("mean", "std", "way"),
    [
        ([0.0] * 3, [1.0] * 3, "normalised not at all"),
        ([0.4] * 3, [0.5] * 3, "normalised otherwise than the backbone expects: minus (0.400, 0.400, 0.400)"),
    ],
)
def test_weights_that_bring_other_statistics_than_the_backbone_s_are_found(copy, data, mean, std, way):
    path = copy("full")
    shape = (1, 3, 1, 1)
    own = {"network.encoder.pixel_mean": torch.tensor(mean), "network.encoder.pixel_std": torch.tensor(std)}
    own = {key: tensor.reshape(shape) for key, tensor in own.items()}
    edit_tensors(path / "model" / "model.safetensors", lambda tensors: tensors.update(own))
    assert way in only(path, "normalisation", data())


def test_a_network_that_normalises_twice_is_found(full, monkeypatch):
    def twice(self, images):
        return ((images - self.pixel_mean) / self.pixel_std - self.pixel_mean) / self.pixel_std

    monkeypatch.setattr(ViT, "normalize", twice)
    assert "normalised twice" in only(full, "normalisation")


def test_images_that_were_divided_before_they_were_saved_are_found(full, root, data, tmp_path):
    (tmp_path / "images").mkdir()
    for path in (root / "images").glob("*.png"):
        Image.fromarray(np.asarray(Image.open(path)) // 127).save(tmp_path / "images" / path.name)
    dark = data(images=str(tmp_path / "images"))
    assert "as if divided by 255 twice" in only(full, "normalisation", dark)


def test_images_that_were_normalised_before_they_were_saved_are_found(full, root, data, tmp_path):
    (tmp_path / "images").mkdir()
    for path in (root / "images").glob("*.png"):
        image = normalised(pil_to_tensor(Image.open(path)))
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "images" / path.name)
    evidence = only(full, "normalisation", data(images=str(tmp_path / "images")))
    assert "as if normalised before they were saved" in evidence


def test_data_that_normalise_by_themselves_are_found(full, data):
    normalised = data()
    plain = normalised.train_set.transform
    normalised.train_set.transform = lambda image, labels: (plain(image, labels)[0].float() - 120, labels)
    assert "the model takes [0, 1] and normalises by itself" in only(full, "normalisation", normalised)


def test_classes_in_another_order_are_found(full, root, data, tmp_path):
    (tmp_path / "classes.yaml").write_text(yaml.safe_dump({"classes": [CLASSES[i] for i in (0, 2, 1)]}))
    evidence = only(full, "label indices", data(classes=str(tmp_path / "classes.yaml")))
    assert "network and data differ in their classes: 1 is 'wall' here and 'sky' there" in evidence


def test_a_label_that_means_no_object_to_the_network_is_found(full, data):
    collides = data()
    plain = collides.train_set.decode_labels
    collides.train_set.decode_labels = lambda picture, source: np.where(plain(picture, source) == 2, 3, 0).astype("u1")
    evidence = only(full, "label indices", collides)
    assert "pixels have the label 3, which means no object" in evidence and "no object 3, outlier 254" in evidence


def test_an_annealing_schedule_longer_than_the_run_is_found(copy):
    path = copy("full")
    shutil.rmtree(path / "checkpoints")
    edit_json(path / "summary.json", lambda s: s.update(planned_steps=12))
    evidence = only(path, "mask annealing")
    assert "1 of 2 masks had not faded when the run ended at step 6" in evidence
    assert "fades from step 8 to 10 and was still at 1.00" in evidence


def test_how_long_an_older_run_was_to_be_follows_from_its_last_checkpoint_or_is_not_known(copy):
    path = copy("full")
    edit_json(path / "summary.json", lambda s: s.pop("planned_steps"))
    edit_config(path, "trainer", max_epochs=4)
    assert "fades from step 8 to 10" in only(path, "mask annealing")
    shutil.rmtree(path / "checkpoints")
    finding = diagnose(path, path)["mask annealing"]
    assert finding.passed is None and "no planned_steps, and no checkpoints/last.ckpt" in finding.evidence
    (path / "config.yaml").unlink()
    finding = diagnose(path, path)["mask annealing"]
    assert finding.passed is None and "neither summary.json nor config.yaml" in finding.evidence


def test_a_run_writes_how_long_it_was_to_be_and_what_it_was_validated_on(full):
    summary = json.loads((full / "summary.json").read_text())
    assert summary["planned_steps"] == summary["steps"] == 6
    assert summary["class_pixels"] == {"road": 2 * 16 * 48, "wall": 2 * 16 * 48, "sky": 2 * 16 * 48}


def test_masks_of_which_the_weights_say_nothing_are_not_looked_at(copy):
    path = copy("lora")
    edit_tensors(path / "adapter" / "heads.safetensors", lambda tensors: tensors.pop("network.attn_mask_probs"))
    finding = diagnose(path, path)["mask annealing"]
    assert finding.passed is None and "no attn_mask_probs" in finding.evidence


def test_annealing_in_steps_that_the_run_never_reached_is_found(copy):
    path = copy("full")
    edit_settings(path / "model", attn_mask_annealing_start=[0, 100], attn_mask_annealing_end=[2, 200])
    assert "from step 100 to 200" in only(path, "mask annealing")


def test_masks_that_never_fade_are_found(copy):
    path = copy("full")
    edit_settings(path / "model", attn_mask_annealing_enabled=False)
    edit_tensors(path / "model" / "model.safetensors", lambda t: t["network.attn_mask_probs"].fill_(1))
    assert "never fade, though the deployed network has none" in only(path, "mask annealing")


def test_a_class_without_pixels_in_the_run_s_validation_is_found(copy):
    path = copy("lora")
    edit_json(path / "summary.json", lambda s: s["class_pixels"].update(wall=0))
    edit_json(path / "summary.json", lambda s: s["class_iou"].update(wall=0.0))  # predicted somewhere
    assert "1 of 3 classes have no pixel: wall" in only(path, "evaluation classes")


def test_an_iou_of_an_older_run_tells_no_class_without_pixels_from_one_never_found(copy, data):
    path = copy("lora")
    edit_json(path / "summary.json", lambda s: s.pop("class_pixels"))
    edit_json(path / "summary.json", lambda s: s["class_iou"].update(wall=None))
    assert "1 of 3 classes have no pixel: wall" in only(path, "evaluation classes")
    edit_json(path / "summary.json", lambda s: s["class_iou"].update(wall=0.0))
    finding = diagnose(path, path)["evaluation classes"]
    assert finding.passed is None and "wall may have no pixel: an IoU of 0" in finding.evidence
    assert diagnose(path, path, data())["evaluation classes"].passed
    emptied = data()
    emptied.val_set.decode_labels = lambda picture, source: np.where(np.asarray(picture) == 1, 2, picture).astype("u1")
    assert "1 of 3 classes have no pixel: wall" in only(path, "evaluation classes", emptied)
    edit_json(path / "summary.json", lambda s: s["data"].update(val="others"))
    assert diagnose(path, path, emptied)["evaluation classes"].passed is None


def test_an_evaluation_that_cannot_be_read_fails_alone(copy):
    path = copy("full")
    (path / "evaluation").mkdir()
    (path / "evaluation" / "night.npz").write_bytes(b"PK\x03\x04half")
    (path / "evaluation" / "night.json").write_text(json.dumps({"classes": ["road"]}))
    assert "night.npz and night.json are not what scripts/evaluate.py writes" in only(path, "evaluation classes")


def test_damage_within_an_evaluation_fails_alone(copy):
    path = copy("full")
    (path / "evaluation").mkdir()
    file = path / "evaluation" / "night.npz"
    np.savez_compressed(file, confusion=np.random.default_rng(0).integers(0, 9, (400, 3, 3)))
    content = bytearray(file.read_bytes())
    content[60:100] = b"\xff" * 40
    file.write_bytes(content)
    file.with_suffix(".json").write_text(json.dumps({"classes": ["road", "wall", "sky"]}))
    assert "night.npz and night.json are not what" in only(path, "evaluation classes")


def test_a_class_without_pixels_in_an_evaluation_is_found_though_it_was_predicted(copy):
    path = copy("full")
    (path / "evaluation").mkdir()
    confusion = np.ones((2, 3, 3), np.int64)
    confusion[:, 1] = 0
    np.savez_compressed(path / "evaluation" / "night.npz", confusion=confusion)
    (path / "evaluation" / "night.json").write_text(json.dumps({"classes": ["road", "wall", "sky"]}))
    assert "evaluation/night: 1 of 3 classes have no pixel: wall" in only(path, "evaluation classes")


@pytest.mark.parametrize(
    ("auprc", "sentence"),
    [
        (0.05, "rba (T 1) on Toy is constant: AuPRC 5.00 % where 5.00 % of the pixels are anomalous"),
        (0.03, "rba (T 1) on Toy is inverted, or knows nothing: AuPRC 3.00 %"),
        (None, "rba (T 1) on Toy has no AuPRC"),
    ],
)
def test_a_score_that_is_constant_or_inverted_is_found(copy, auprc, sentence):
    path = copy("full")
    write_scores(path, SCORE, SCORE | {"auprc": auprc})
    evidence = only(path, "anomaly scores")
    assert evidence.startswith("1 of 2 scores") and sentence in evidence


def test_the_scores_that_the_evaluation_writes_are_read_and_an_inverted_one_is_found(
    copy, call_script, monkeypatch, tmp_path
):
    path = copy("full")
    toys = AnomalyDataset(write_toy_anomalies(tmp_path, 4, (64, 128)), "toy_anomalies")

    def oracle(frame, variants):
        labels = toys.labels(toys.frames.index(frame)).numpy()
        score = labels + np.linspace(0, 0.5, labels.size, dtype=np.float32).reshape(labels.shape)
        return {(name, t): score if name == "msp" else -score for name, t in variants}

    monkeypatch.setattr(LogitCache, "read", lambda cache, frame, device="cpu": frame)
    monkeypatch.setattr(evaluation, "score_maps", oracle)
    settings = [
        "data=toy_anomalies",
        f"data.root={tmp_path}",
        "data.number=4",
        "data.size=[64,128]",
        "scores=[msp,rba]",
    ]
    code, error = call_script("evaluate_anomaly.py", path, *settings, "--pictures", "0")
    assert code == 0, error
    evidence = only(path, "anomaly scores")
    assert evidence.startswith("1 of 2 scores; rba (T 1) on ") and "is inverted, or knows nothing" in evidence
    assert "msp" not in evidence


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({"title": "Toy", "results": []}, "look at results"),
        ({"results": [SCORE]}, "look at title"),
        ({"title": "Toy", "results": {"rba": SCORE}}, "look at results"),
        ({"title": "Toy", "results": [SCORE, {k: v for k, v in SCORE.items() if k != "valid"}]}, "look at valid"),
        ({"title": "Toy", "results": [SCORE | {"auprc": "high"}]}, "look at auprc"),
        ([SCORE], "holds a list"),
    ],
)
def test_scores_that_are_not_what_the_evaluation_writes_are_named(copy, content, named):
    path = copy("full")
    (path / "anomaly").mkdir()
    (path / "anomaly" / "toy.json").write_text(json.dumps(content))
    evidence = only(path, "anomaly scores")
    assert str(path / "anomaly" / "toy.json") in evidence and named in evidence


def test_a_file_that_cannot_be_read_fails_the_checks_that_need_it_alone(copy, monkeypatch):
    path = copy("full")
    (path / "config.yaml").write_text("data: {")
    assert "config.yaml cannot be read" in only(path, "sizes")
    (path / "config.yaml").write_text("")
    assert "config.yaml is empty" in only(path, "sizes")
    (path / "config.yaml").unlink()
    plain = Path.read_text

    def refused(file, *arguments, **options):
        if file.name == "summary.json":
            raise PermissionError(13, "Permission denied", str(file))
        return plain(file, *arguments, **options)

    monkeypatch.setattr(Path, "read_text", refused)
    found = failed(path)
    assert "Permission denied" in found["gradients"] and "sizes" not in found and "normalisation" not in found


# Weights that the run started from


def replace_start(path, start, artefact, edit=lambda tensors: None):
    """Puts the start weights of a run to `start`, edited."""
    shutil.copytree(json.loads((path / artefact / "eomt_config.json").read_text())["init"]["ckpt_path"], start)
    edit_tensors(start / "model.safetensors", edit)
    edit_settings(path / artefact, ckpt_path=str(start))


def noise(key):
    return lambda tensors: tensors[key].add_(1)


@pytest.mark.parametrize("key", ["network.q.weight", "network.encoder.backbone.blocks.0.attn.qkv.weight"])
@pytest.mark.parametrize(("name", "artefact"), [("tuned", "model"), ("lora", "adapter")])
def test_start_weights_that_were_replaced_are_not_compared_with(copy, tmp_path, name, artefact, key):
    path = copy(name)
    replace_start(path, tmp_path / "same", artefact)
    assert diagnose(path, path)["trained weights"].passed
    replace_start(path, tmp_path / "others", artefact, noise(key))
    finding = diagnose(path, path)["trained weights"]
    assert finding.passed is None and "are no longer those that the run started from" in finding.evidence
    assert str(tmp_path / "others") in finding.evidence


def test_an_adapter_s_own_hash_tells_of_a_base_that_was_replaced(copy, tmp_path):
    path = copy("lora")
    edit_json(path / "summary.json", lambda s: s.pop("start_fingerprint"))
    replace_start(path, tmp_path / "start", "adapter", noise("network.encoder.backbone.blocks.0.attn.qkv.weight"))
    assert "are no longer those" in diagnose(path, path)["trained weights"].evidence


def test_an_adapter_whose_base_was_replaced_fails_with_both_fingerprints(copy, tmp_path):
    path = copy("lora")
    replace_start(path, tmp_path / "start", "adapter", noise("network.encoder.backbone.blocks.0.attn.qkv.weight"))
    evidence = only(path, "checkpoint keys")
    assert "start does not fit: other weights: fingerprint " in evidence and "the adapter was trained on " in evidence


def test_a_random_base_beside_the_adapter_that_was_replaced_is_found(root, tmp_path):
    path = train(root, tmp_path / "run", "--use_lora")
    assert failed(path) == {}
    edit_tensors(path / "adapter" / "base.safetensors", noise("network.encoder.backbone.blocks.0.attn.qkv.weight"))
    assert "does not fit: other weights" in only(path, "checkpoint keys")


def test_a_folder_of_start_weights_that_is_empty_is_named(copy, tmp_path):
    path = copy("lora")
    (tmp_path / "empty").mkdir()
    edit_settings(path / "adapter", ckpt_path=str(tmp_path / "empty"))
    findings = diagnose(path, path)
    assert findings["trained weights"].evidence == f"the run started from {tmp_path / 'empty'}, which holds no weights"
    assert not any(f.passed is False for f in findings.values()) and findings["adapter updates"].passed


def test_start_weights_that_cannot_be_read_are_said_and_the_rest_is_looked_at(copy, tmp_path):
    path = copy("lora")
    (tmp_path / "half.safetensors").write_bytes(b"half")
    edit_settings(path / "adapter", ckpt_path=str(tmp_path / "half.safetensors"))
    found = failed(path)
    assert found.keys() == {"trained weights", "checkpoint keys"} and "half.safetensors" in found["trained weights"]


# The checks alone


@pytest.mark.parametrize("norm", [0.0, float("nan"), float("inf")])
def test_an_update_is_a_number_above_zero(norm):
    assert check_adapter_updates({"a": 1.0}).passed and not check_adapter_updates({"a": 1.0, "b": norm}).passed


@pytest.mark.parametrize("moment", [0.0, float("nan"), float("inf")])
def test_a_gradient_is_finite_and_not_zero(moment):
    assert check_gradients(["q"], [1e-9]).passed
    assert check_gradients(["q", "k"], [1e-9, moment]).evidence.endswith(": k")


def test_what_trains_must_change_and_what_is_frozen_must_not():
    assert check_trained_weights({"q"}, {"q": False, "k": True}).passed
    assert (
        not check_trained_weights({"q"}, {"q": True}).passed and not check_trained_weights({"q"}, {"k": False}).passed
    )


@pytest.mark.parametrize(("classes", "passed"), [(19, True), (253, True), (254, False)])
def test_no_object_must_not_be_the_outlier_s_label(classes, passed):
    assert check_label_indices(classes).passed is passed


def test_outliers_and_ignored_pixels_may_be_in_the_data_but_not_alone():
    assert check_label_indices(3, pixels={0: 5, 2: 5, 254: 1, 255: 9}).passed
    assert "no pixel has the label of a class" in check_label_indices(3, pixels={255: 9}).evidence
    assert "7 pixels have the label 200, which means nothing" in check_label_indices(3, pixels={0: 1, 200: 7}).evidence


def test_masks_must_have_faded_at_the_last_step():
    assert check_mask_annealing([(0, 5), (5, 10)], 10, []).passed
    assert not check_mask_annealing([(0, 5), (5, 11)], 10, []).passed
    assert check_mask_annealing(None, 10, [0.0, 0.0]).passed and not check_mask_annealing(None, 10, [0.0, 0.5]).passed


def of_values(images, mean, std):
    return Channels.of((images - torch.tensor(mean).reshape(3, 1, 1)) / torch.tensor(std).reshape(3, 1, 1))


@pytest.mark.parametrize("contrast", [1.0, 0.15])
@pytest.mark.parametrize("expected", [IMAGENET, Channels((0.5,) * 3, (0.5,) * 3)])
def test_normalisation_is_told_from_its_statistics_whatever_the_images(contrast, expected):
    images = contrast * torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    once = (images - torch.tensor(expected.mean).reshape(3, 1, 1)) / torch.tensor(expected.std).reshape(3, 1, 1)
    check = partial(check_normalisation, Channels.of(images), expected=expected, source="noise", clipped=0)
    assert check(Channels.of(once)).passed
    assert "normalised not at all" in check(Channels.of(images)).evidence
    assert "normalised twice" in check(of_values(once, expected.mean, expected.std)).evidence
    assert "otherwise" in check(of_values(images, (0.4,) * 3, (0.3,) * 3)).evidence


@pytest.mark.parametrize(("clipped", "passed"), [(0.3, True), (0.5, False)])
def test_images_of_which_a_large_share_is_clipped_were_normalised_before(clipped, passed):
    shown, mean, std = Channels((0.5,) * 3, (0.2,) * 3), IMAGENET.mean, IMAGENET.std
    seen = Channels(tuple((0.5 - m) / s for m, s in zip(mean, std, strict=True)), tuple(0.2 / s for s in std))
    finding = check_normalisation(shown, seen, IMAGENET, "noise", clipped)
    assert finding.passed is passed and f"{100 * clipped:.1f} % of the stored values are 0 or 255" in finding.evidence


def normalised(image):
    """As a picture that was normalised before it was saved."""
    mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in (IMAGENET.mean, IMAGENET.std))
    return (((image / 255 - mean) / std).clamp(0, 1) * 255).byte()


@pytest.mark.parametrize("domain", ["clear", "night_fog"])
def test_toy_scenes_are_far_from_clipped_and_normalised_ones_are(domain):
    for seed in range(4):
        scene = torch.from_numpy(draw_scene(np.random.default_rng(seed), (64, 128), domain)[0]).permute(2, 0, 1)
        assert share_clipped(scene) < CLIPPED / 4 and share_clipped(normalised(scene)) > CLIPPED


def test_camvid_is_far_from_clipped_and_its_normalised_images_are(camvid_root):
    files = sorted((Path(camvid_root) / "train").glob("*.jpg"))
    scenes = [pil_to_tensor(Image.open(files[i]).convert("RGB")) for i in spread(len(files), 16)]
    assert max(map(share_clipped, scenes)) < CLIPPED - 0.05
    assert np.mean([share_clipped(scene) for scene in scenes]) < CLIPPED / 2
    assert np.mean([share_clipped(normalised(scene)) for scene in scenes]) > CLIPPED + 0.2


def test_a_score_without_a_value_is_not_above_chance():
    assert not check_anomaly_scores({"Toy": [SCORE | {"auprc": float("nan")}]}).passed


def test_a_score_above_the_share_of_anomalies_passes_with_its_figures():
    finding = check_anomaly_scores({"Toy": [SCORE, SCORE | {"score": "msp", "auprc": 0.06}]})
    assert finding.passed and finding.evidence.endswith("msp (T 1) on Toy: 6.00 % at a share of 5.00 %")


# The command line


@pytest.fixture
def call(call_script, tmp_path):
    """The command in this process: exit code and findings."""

    def called(*arguments):
        code, error = call_script("doctor.py", *arguments, "--json", tmp_path / "out" / "findings.json")
        assert not error
        return code, json.loads((tmp_path / "out" / "findings.json").read_text())["checks"]

    return called


def test_the_command_prints_a_line_each_and_exits_by_what_it_found(copy, call):
    path = copy("lora")
    write_scores(path, SCORE | {"auprc": 0.01})
    result = run(path)
    assert result.returncode == 1 and not result.stderr, result.stdout + result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == 13 and lines[-1] == "11 passed, 1 failed, 0 not checked; failed: anomaly scores"
    assert lines[11].startswith("failed") and "inverted" in lines[11]
    assert all(line.startswith("passed") for line in lines[:11])
    shutil.rmtree(path / "anomaly")
    code, findings = call(path)
    assert code == 0 and findings["sizes"]["result"] == "passed"
    assert (
        findings["anomaly scores"]["result"] == "not checked"
        and "anomaly/*.json" in findings["anomaly scores"]["evidence"]
    )


def test_data_that_have_moved_are_said_and_found_where_they_are_now(copy, call, root, tmp_path):
    path = copy("full")
    edit_config(path, "data", images=str(tmp_path / "gone"))
    code, findings = call(path)
    assert code == 0 and "drawn scenes (no data: " in findings["normalisation"]["evidence"]
    code, findings = call(path, f"data.images={root / 'images'}")
    assert code == 0 and "6 training crops" in findings["normalisation"]["evidence"]


def test_start_weights_that_have_moved_are_found_where_they_are_now(copy, full, call, tmp_path):
    path = copy("lora")
    edit_settings(path / "adapter", ckpt_path=str(tmp_path / "gone"))
    assert call(path)[1]["trained weights"]["result"] == "not checked"
    code, findings = call(path, "--ckpt_path", full / "model")
    assert code == 0 and findings["trained weights"]["result"] == "passed"
    assert "of the start weights" in findings["checkpoint keys"]["evidence"]


@pytest.mark.parametrize("content", ["", "- a", "data: {", "data: 5", "data: {a: 1}", "model:\ntrainer:"])
def test_a_broken_configuration_ends_in_a_line_and_not_in_a_traceback(copy, call, call_script, content):
    path = copy("full")
    (path / "config.yaml").write_text(content)
    code, findings = call(path)
    assert code < 2 and "config.yaml does not say them" in findings["normalisation"]["evidence"]
    code, error = call_script("doctor.py", path, "data.num_workers=0")
    assert code == 2 and error.startswith("error: ") and error.count("\n") == 1


def test_data_may_be_named_for_a_model_without_a_run(full, call, root, tmp_path):
    shutil.copytree(full / "model", tmp_path / "model")
    data = [f"data.{key}={root / key}" for key in ("images", "masks")] + [f"data.classes={root / 'classes.yaml'}"]
    code, findings = call(tmp_path / "model", "data=folder", *data)
    assert code == 0 and "labels in the data: 0..2" in findings["label indices"]["evidence"]


def test_mistakes_end_in_one_sentence(call_script, full, tmp_path):
    (tmp_path / "half.safetensors").write_bytes(b"half")
    for arguments, sentence in [
        ((tmp_path / "nothing",), "no such file or folder"),
        ((tmp_path / "half.safetensors",), "cannot be read"),
        ((full, "data.imagess=x"), "did you mean images?"),
        ((full, "data=nosuch"), "data=nosuch is not a dataset"),
        ((full, "--ckpt_path", tmp_path / "nothing"), "nothing: no such file or folder"),
        ((full, "model.num_q=3"), "only the data can be chosen here"),
        ((), "RUN_OR_MODEL"),
    ]:
        code, error = call_script("doctor.py", *arguments)
        assert code == 2 and sentence in error and "Traceback" not in error, (arguments, error)
        assert error.startswith("usage: ") or (error.startswith("error: ") and error.count("\n") == 1)


def test_help_shows_examples():
    result = run("--help")
    assert result.returncode == 0 and "python scripts/doctor.py outputs/lora" in result.stdout
