"""scripts/doctor.py: a healthy run passes, and each fault that is planted in one is found."""

import json
import os
import shutil
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, run_script
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from eomt.data.folder import folder
from eomt.models.vit import ViT
from eomt.reporting.doctor import (
    Channels,
    check_adapter_updates,
    check_anomaly_scores,
    check_gradients,
    check_label_indices,
    check_mask_annealing,
    check_normalisation,
    check_trained_weights,
    examine,
)

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
    command = [sys.executable, ROOT / "train_with_lora.py", "data=folder", *data, *MODEL, "data.batch_size=2"]
    command += ["data.num_workers=0", "trainer.max_epochs=2", "model.lr=1e-3", f"output_dir={output}", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    return output


@pytest.fixture(scope="module")
def full(root, tmp_path_factory):
    return train(root, tmp_path_factory.mktemp("full"))


@pytest.fixture(scope="module")
def lora(root, full, tmp_path_factory):
    return train(root, tmp_path_factory.mktemp("lora"), "--use_lora", f"model.ckpt_path={full}/model")


@pytest.fixture
def copy(full, lora, tmp_path):
    """A run to plant a fault in."""

    def copied(name):
        shutil.copytree({"full": full, "lora": lora}[name], tmp_path / name)
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
    return {name: f.evidence for name, f in examine(path, path, data).items() if f.passed is False}


def only(path, check, data=None):
    """The evidence of this check, the only one that fails."""
    found = failed(path, data)
    assert list(found) == [check], found
    return found[check]


def test_a_healthy_lora_run_passes_every_check(copy, data):
    path = copy("lora")
    write_scores(path, SCORE)
    findings = examine(path, path, data())
    assert {name: f.evidence for name, f in findings.items() if not f.passed} == {}
    assert len(findings) == 12
    evidence = {name: f.evidence for name, f in findings.items()}
    assert (
        evidence["adapter updates"].startswith("6 layers, norms ") and "6 training crops" in evidence["normalisation"]
    )
    assert "labels in the data: 0..2" in evidence["label indices"]
    assert "num_blocks 2, num_classes 3, num_q 10" in evidence["sizes"] and "config.yaml" in evidence["sizes"]


def test_a_healthy_full_run_passes_every_check_that_has_something_to_look_at(full, data):
    findings = examine(full, full, data())
    assert not any(f.passed is False for f in findings.values()), findings
    without = {name: f.evidence for name, f in findings.items() if f.passed is None}
    assert without.keys() == {"adapter updates", "lora audit", "trained weights", "anomaly scores"}
    assert "random weights" in without["trained weights"] and without["adapter updates"] == "no adapter"
    assert "faded out at step 6 of 6" in findings["mask annealing"].evidence


def test_a_healthy_run_that_freezes_a_head_passes_from_its_folder_and_its_checkpoint(root, full, tmp_path):
    path = train(root, tmp_path / "run", "--use_lora", f"model.ckpt_path={full}/model", "model.freeze=[mask_head]")
    for artefact in (path, path / "checkpoints" / "last.ckpt"):  # which leaves the frozen head out
        findings = examine(artefact, path)
        assert not any(f.passed is False for f in findings.values()), findings
    assert "6 frozen ones have not" in examine(path, path)["trained weights"].evidence


@pytest.mark.parametrize("file", ["best.ckpt", "last.ckpt"])
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_healthy_lightning_checkpoint_passes(full, lora, kind, file):
    path = {"full": full, "lora": lora}[kind]
    findings = examine(path / "checkpoints" / file, path)
    assert not any(f.passed is False for f in findings.values()), findings
    assert findings["checkpoint keys"].passed


def test_a_model_without_its_run_is_not_checked_for_what_only_a_run_tells(full, tmp_path):
    shutil.copytree(full / "model", tmp_path / "model")
    findings = examine(tmp_path / "model", tmp_path / "model")
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
    findings = examine(tmp_path / "model.safetensors", tmp_path)
    assert findings["sizes"].passed and findings["normalisation"].passed is None
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
    extra = {"network.encoder.backbone.blocks.3.attn.qkv.weight": torch.zeros(2)}
    edit_tensors(tmp_path / "start" / "model.safetensors", lambda tensors: tensors.update(extra))
    edit_settings(path / "adapter", ckpt_path=str(tmp_path / "start"))
    assert "the start weights: 1 of " in only(path, "checkpoint keys")


def test_half_an_adapter_is_found(copy):
    path = copy("lora")
    key = "base_model.model.blocks.0.attn.proj.lora_B.weight"
    edit_tensors(path / "adapter" / "adapter_model.safetensors", lambda tensors: tensors.pop(key))
    found = failed(path)
    assert found["adapter updates"] == "the adapter holds 6 tensors lora_A and 5 tensors lora_B"
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
    edit_config(path, "trainer", max_epochs=4)
    evidence = only(path, "mask annealing")
    assert "2 of 2 masks had not faded when the run ended at step 6" in evidence
    assert "fades from step 10 to 12 and was still at 1.00" in evidence


def test_annealing_in_steps_that_the_run_never_reached_is_found(copy):
    path = copy("full")
    edit_settings(path / "model", attn_mask_annealing_start=[0, 100], attn_mask_annealing_end=[2, 200])
    assert "from step 100 to 200" in only(path, "mask annealing")


def test_masks_that_never_fade_are_found(copy):
    path = copy("full")
    edit_settings(path / "model", attn_mask_annealing_enabled=False)
    assert "never fade, though the deployed network has none" in only(path, "mask annealing")


def test_a_class_without_pixels_in_the_run_s_validation_is_found(copy):
    path = copy("lora")
    edit_json(path / "summary.json", lambda s: s["class_iou"].update(wall=None))
    assert "1 of 3 classes have no pixel: wall" in only(path, "evaluation classes")


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
    check = partial(check_normalisation, Channels.of(images), expected=expected, source="noise")
    assert check(Channels.of(once)).passed
    assert "normalised not at all" in check(Channels.of(images)).evidence
    assert "normalised twice" in check(of_values(once, expected.mean, expected.std)).evidence
    assert "otherwise" in check(of_values(images, (0.4,) * 3, (0.3,) * 3)).evidence


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
    assert len(lines) == 13 and lines[-1] == "11 passed, 1 failed, 0 not checked"
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


def test_data_may_be_named_for_a_model_without_a_run(full, call, root, tmp_path):
    shutil.copytree(full / "model", tmp_path / "model")
    data = [f"data.{key}={root / key}" for key in ("images", "masks")] + [f"data.classes={root / 'classes.yaml'}"]
    code, findings = call(tmp_path / "model", "data=folder", *data)
    assert code == 0 and "labels in the data: 0..2" in findings["label indices"]["evidence"]


def test_mistakes_end_in_one_sentence(call_script, full, tmp_path):
    (tmp_path / "half.safetensors").write_bytes(b"half")
    for arguments, code, sentence in [
        ((tmp_path / "nothing",), 1, "no such file or folder"),
        ((tmp_path / "half.safetensors",), 1, "cannot be read"),
        ((full, "data.imagess=x"), 1, "did you mean images?"),
        ((full, "data=nosuch"), 1, "data=nosuch is not a dataset"),
        ((full, "model.num_q=3"), 2, "only the data can be chosen here"),
        ((), 2, "RUN_OR_MODEL"),
    ]:
        found, error = call_script("doctor.py", *arguments)
        assert found == code and sentence in error and "Traceback" not in error, (arguments, error)
        assert code == 2 or (error.startswith("error: ") and error.count("\n") == 1)


def test_help_shows_examples():
    result = run("--help")
    assert result.returncode == 0 and "python scripts/doctor.py outputs/lora" in result.stdout
