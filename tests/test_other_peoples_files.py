"""What somebody else's files name is checked before it is imported, and nothing of theirs runs."""

import json
import pickle
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import TINY

from eomt.comparison.evaluations import evaluate_run
from eomt.comparison.result_files import read_confusion
from eomt.inference.artefacts import read_lightning
from eomt.models.checkpoint import read_checkpoint
from eomt.settings.compose import check_data_for, compose_run, data_of_run, open_data
from eomt.settings.config_check import check_config
from eomt.settings.run import check_data, check_run
from eomt.training.mask_classification_semantic import MaskClassificationSemantic

SAVED = Path(__file__).parent / "saved"


@pytest.fixture
def trap(tmp_path, monkeypatch):
    """A module that leaves a file when it is imported."""
    (tmp_path / "trap.py").write_text(
        f"from pathlib import Path\nsprung = Path({str(tmp_path / 'sprung')!r})\nsprung.touch()\n"
        "def data(**_): return None\nclass Data:\n    def __init__(self, **_): pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path / "sprung"
    sys.modules.pop("trap", None)
    assert not (tmp_path / "sprung").exists(), "it was imported"


@pytest.fixture
def run(tmp_path):
    shutil.copytree(SAVED / "run", tmp_path / "run")
    return tmp_path / "run"


def edit(run, **changes):
    """Data settings of the run's config.yaml."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["data"] |= changes
    config["allow_any_target"] = True
    (run / "config.yaml").write_text(yaml.safe_dump(config))


OTHERS = ["trap.data", "trap.Data", "os.system", "torch.load", "eomt.files.write_text", "eomt.data.camvid.os.system"]


@pytest.mark.parametrize("name", [*OTHERS, "eomt.training.callbacks.SaveBest", "", 3, None, ["os.system"]])
def test_an_opened_folder_names_data_of_this_project_and_nothing_else(trap, run, name):
    edit(run, _target_=name)
    for use in (check_data_for, data_of_run):
        with pytest.raises(ValueError, match=r"run/config\.yaml.*names? "):
            use(run, ())


@pytest.mark.parametrize(
    "changes",
    [
        {"cut_paste": {"_target_": "trap.Data"}},
        {"cut_paste": {"_target_": "eomt.anomaly.cut_paste.CutPaste", "cutouts": {"_target_": "os.system"}}},
        {"size": [{"_target_": "trap.Data"}]},
        {"size": [[{"a": {"_target_": "trap.Data"}}]]},
        {"_partial_": True},
        {"_recursive_": False},
        {"_args_": ["a"]},
    ],
)
def test_nothing_is_hidden_deeper_in_an_opened_folder(trap, run, changes):
    edit(run, **changes)
    for use in (check_data_for, data_of_run):
        with pytest.raises(ValueError, match=r"run/config\.yaml.*(names?|_) "):
            use(run, ())


def test_a_name_that_is_none_is_said_of_an_opened_folder(run):
    config = (run / "config.yaml").read_text().replace("data:\n", "data:\n  1: 2\n")
    (run / "config.yaml").write_text(config)
    with pytest.raises(ValueError, match=r"config\.yaml has 1 in its data, which is no name"):
        data_of_run(run)


def test_code_in_yaml_is_not_run(trap, run):
    with (run / "config.yaml").open("a") as file:
        file.write("more: !!python/object/apply:trap.data []\n")
    with pytest.raises(ValueError, match=r"config\.yaml cannot be read"):
        data_of_run(run)


def test_overrides_from_a_file_name_data_of_this_project_and_nothing_else(trap):
    for word in ("data._target_=trap.data", "+data.extra={_target_: trap.Data}", "data._target_=os.system"):
        with pytest.raises(ValueError, match="names "):
            open_data(["data=toy_streets", word, "++allow_any_target=true"], [64, 64], 1)


@pytest.mark.parametrize(
    "name",
    [
        "trap.Data",
        "os.system",
        "builtins.eval",
        "numpy.load",
        "joblib.load",
        "setuptools._distutils.spawn.spawn",
        "subprocess.Popen",
        "torch.load",
        "torch.hub.load",
        "torch.utils.cpp_extension.BuildExtension",
        "torch.utils.data.DataLoader",
        "torch.multiprocessing.Process",
        "torch.package.PackageImporter",
        "torch.os.system",
        "torch._utils.Thing",
        "lightning.pytorch.cli.LightningCLI",
        "lightning.pytorch.callbacks.timer.timedelta",
        "hydra.utils.instantiate",
        "hydra.utils.get_method",
        "hydra.utils.Path",
        "eomt.files.shutil.rmtree",
        "eomt.comparison.cells.run_logged",
        "eomt.files.write_text",
        "eomt.files.Path",
        "eomt.files:write_text",
        "eomt",
        "trap",
        "",
        7,
    ],
)
def test_a_training_configuration_names_this_project_and_public_classes_of_its_libraries(trap, name):
    for node in ({"x": {"_target_": name}}, {"x": [{"y": {"_target_": name}}]}):
        with pytest.raises(ValueError, match=r"_target_"):
            check_config(node)
    with pytest.raises(ValueError, match=r"data\._target_"):
        check_data({"_target_": name})


@pytest.mark.parametrize(
    "name", ["torch.optim.SGD", "torch.nn.Identity", "torchmetrics.Metric", "lightning.pytorch.callbacks.EarlyStopping"]
)
def test_usual_names_pass(name):
    check_config({"x": {"_target_": name, "_partial_": True}})


def test_any_name_passes_where_it_is_allowed():
    check_config({"x": {"_target_": "pathlib.PurePath"}}, any_target=True)
    with pytest.raises(ValueError, match="set allow_any_target=true"):
        check_config({"x": {"_target_": "pathlib.PurePath"}})


def test_the_whole_configuration_says_whether_any_name_may_stand_in_it(trap):
    from omegaconf import OmegaConf

    words = ["experiment=toy_source", "model.lora_method=trap.Data"]
    config = OmegaConf.to_container(compose_run(words), resolve=True)
    assert config["allow_any_target"] is False
    with pytest.raises(ValueError, match=r"model\.lora_method 'trap\.Data'.*allow_any_target=true"):
        check_run(config)
    check_run(config | {"allow_any_target": True})


def test_a_saved_network_imports_nothing(trap, tmp_path):
    MaskClassificationSemantic(**TINY, use_lora=True).save_pretrained(tmp_path / "adapter")
    for name, changes in (
        ("adapter_config.json", {"megatron_config": {"a": 1}, "megatron_core": "trap"}),
        ("adapter_config.json", {"loftq_config": {"a": 1}}),
        ("eomt_config.json", {"lora_method": "trap.Data"}),
        ("eomt_config.json", {"backbone_kwargs": {**TINY["backbone_kwargs"], "checkpoint_path": "x.pth"}}),
        ("eomt_config.json", {"backbone_name": "hf-hub:trap/trap"}),
        ("eomt_config.json", {"backbone_name": "local-dir:/tmp"}),
    ):
        file = tmp_path / "adapter" / name
        before = file.read_text()
        content = json.loads(before)
        if name == "eomt_config.json":
            content["artefact_id"] = None
            content["init"] |= changes
        else:
            content |= changes
        file.write_text(json.dumps(content))
        with pytest.raises(ValueError):
            MaskClassificationSemantic.from_pretrained(tmp_path / "adapter")
        file.write_text(before)


def test_pickles_are_not_run(tmp_path):
    class Deadly:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "sprung",))

    torch.save({"state_dict": {"a": torch.zeros(1)}, "b": Deadly()}, tmp_path / "a.ckpt")
    (tmp_path / "b.ckpt").write_bytes(pickle.dumps(Deadly()))
    np.savez(tmp_path / "a.npz", confusion=np.array([Deadly()], dtype=object))
    for use, name in ((read_lightning, "a.ckpt"), (read_checkpoint, "a.ckpt"), (read_lightning, "b.ckpt")):
        with pytest.raises(ValueError, match="pickled objects"):
            use(tmp_path / name)
    with pytest.raises(ValueError, match=r"a\.npz"):
        read_confusion(tmp_path / "a.npz", {"images": ["a"], "classes": ["a"]})
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("artefact", ["../../elsewhere", "/etc", "", None, 3])
def test_a_summary_names_a_folder_of_its_run(run, artefact):
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(summary | {"artefact": artefact}))
    with pytest.raises(ValueError, match=r"summary\.json names as artefact"):
        evaluate_run(run)
