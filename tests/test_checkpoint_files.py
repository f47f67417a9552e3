"""Whatever a run writes is there as a whole or not at all, and has the mode that the umask says."""

import os
import signal
import stat
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import lightning
import numpy as np
import pytest
import torch
from conftest import TINY
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from eomt.anomaly.evaluation import LogitCache
from eomt.diagnosis.inspection import inspect_model
from eomt.files import read_json
from eomt.fingerprints import checksums
from eomt.inference.video import write_video
from eomt.inference.windows import WindowLogits
from eomt.settings.compose import data_of_run
from eomt.training.callbacks import SaveBest
from eomt.training.checkpoint_files import BestCheckpoint, CheckpointFiles
from eomt.training.evaluation import Evaluation
from eomt.training.mask_classification_semantic import MaskClassificationSemantic

ROOT = Path(__file__).parents[1]
KILLED = """
import os, signal, sys, torch
from eomt.training.checkpoint_files import BestCheckpoint, CheckpointFiles

class Deadly:
    def __reduce__(self):
        os.kill(os.getpid(), signal.SIGKILL)

CheckpointFiles().save_checkpoint({"a": torch.zeros(10**6), "b": Deadly()}, sys.argv[1])
"""


def build(**settings):
    torch.manual_seed(0)
    return MaskClassificationSemantic(**{**TINY, **settings})


def modes(folder):
    return {str(p.relative_to(folder)): stat.S_IMODE(p.stat().st_mode) for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """A checkpoint, and an empty folder for temporary files."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr("tempfile.tempdir", None)
    path = tmp_path / "checkpoints" / "last.ckpt"
    CheckpointFiles().save_checkpoint({"step": 1}, path)
    return path


def test_a_full_disk_leaves_the_earlier_checkpoint_and_no_other_file(saved, monkeypatch):
    def half(content, place):
        Path(place).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with (
        monkeypatch.context() as patch,
        pytest.raises(OSError, match=r"no room for .*: more than 0.0 KiB are needed"),
    ):
        patch.setattr(torch, "save", half)
        CheckpointFiles().save_checkpoint({"step": 2}, saved)
    assert torch.load(saved, weights_only=True) == {"step": 1}
    assert os.listdir(saved.parent) == ["last.ckpt"] and not os.listdir(os.environ["TMPDIR"])


def test_a_process_killed_while_it_saves_leaves_the_earlier_checkpoint_and_its_draft_goes_with_the_next(saved):
    ran = subprocess.run([sys.executable, "-c", KILLED, str(saved)], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == -signal.SIGKILL, ran.stderr
    assert torch.load(saved, weights_only=True) == {"step": 1}
    assert len(os.listdir(saved.parent)) == 2 and not os.listdir(os.environ["TMPDIR"])
    CheckpointFiles().save_checkpoint({"step": 2}, saved)
    assert torch.load(saved, weights_only=True) == {"step": 2}
    assert os.listdir(saved.parent) == ["last.ckpt"]


def test_runs_save_their_checkpoints_this_way():
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        config = compose("cityscapes", ["data.root=/nowhere", "trainer.accelerator=cpu"])
    trainer = instantiate(config.trainer, logger=False, _convert_="all")
    assert type(trainer.strategy.checkpoint_io) is CheckpointFiles


def test_adapter_model_checkpoints_and_evaluations_have_the_umasks_mode(tmp_path):
    before = os.umask(0o027)
    try:
        build().save_pretrained(tmp_path / "model")
        build(use_lora=True).save_pretrained(tmp_path / "adapter")
        SaveBest(tmp_path / "run").save(build(use_lora=True))
        CheckpointFiles().save_checkpoint({"step": 1}, tmp_path / "last.ckpt")
        scores(1).save(tmp_path / "evaluation", "target")
        LogitCache(tmp_path / "logits").folder.mkdir()
        LogitCache(tmp_path / "logits").write("frame", logits(0))
    finally:
        os.umask(before)
    found = modes(tmp_path)
    assert len(found) == 2 + 5 + 5 + 1 + 2 + 1 and set(found.values()) == {0o640}, found


def test_an_adapter_that_cannot_be_written_whole_leaves_the_earlier_one(tmp_path, monkeypatch):
    build(use_lora=True, lora_rank=4).save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "README.md").touch()
    before = {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()}
    monkeypatch.setattr("eomt.inference.artefacts.write_json", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        build(use_lora=True, lora_rank=8).save_pretrained(tmp_path / "adapter")
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()}


def test_the_best_artefact_stays_until_the_next_is_whole(tmp_path):
    save, module = SaveBest(tmp_path), build()
    save.save(module)
    module.save_pretrained = lambda draft: (draft / "half").touch() or 1 / 0
    with pytest.raises(ZeroDivisionError):
        save.save(module)
    assert sorted(os.listdir(tmp_path)) == ["model"]
    assert sorted(os.listdir(tmp_path / "model")) == ["eomt_config.json", "model.safetensors"]


def test_a_run_that_goes_on_elsewhere_takes_the_best_artefact_along(tmp_path):
    earlier = SaveBest(tmp_path / "earlier")
    earlier.best = {"miou": 0.5}
    earlier.save(build())
    for _ in range(2):  # as each process of a run does
        here = SaveBest(tmp_path / "here")
        here.load_state_dict(earlier.state_dict())
    assert here.best == {"miou": 0.5} and os.listdir(tmp_path / "here") == ["model"]
    assert len(os.listdir(tmp_path / "here" / "model")) == 2


def at_step(step, ckpt_path=None):
    """The part of a trainer that `SaveBest` looks at."""
    return SimpleNamespace(sanity_checking=False, global_step=step, is_global_zero=True, ckpt_path=ckpt_path)


def test_a_run_without_validation_ships_its_last_step_also_when_it_is_resumed(tmp_path):
    first, second = build(num_q=5), build(num_q=6)
    save = SaveBest(tmp_path)
    save.on_fit_end(at_step(10), first)
    resumed = SaveBest(tmp_path)
    resumed.load_state_dict(SaveBest(tmp_path).state_dict())  # of a checkpoint before the end
    resumed.setup(at_step(10, ckpt_path="last.ckpt"), second, "fit")
    resumed.on_fit_end(at_step(20), second)
    assert MaskClassificationSemantic.from_pretrained(tmp_path).hparams.num_q == 6
    assert resumed.artefact_id == read_json(tmp_path / "model" / "eomt_config.json")["artefact_id"] != save.artefact_id


def test_a_new_run_is_refused_where_an_artefact_of_another_lies(tmp_path):
    for use_lora in (False, True):
        save = SaveBest(tmp_path / str(use_lora))
        save.save(build(use_lora=not use_lora))  # also one of the other kind
        with pytest.raises(ValueError, match=r"holds (adapter|model)/ of another run: choose another folder"):
            SaveBest(tmp_path / str(use_lora)).on_fit_start(at_step(0), build(use_lora=use_lora))
        save.on_fit_start(at_step(8), build())  # its own is no reason


def test_a_run_that_goes_on_where_another_artefact_lies_is_refused(tmp_path):
    earlier = SaveBest(tmp_path / "earlier")
    earlier.on_validation_epoch_end(at_step(4), validated(build(), 0.5))
    SaveBest(tmp_path / "here").save(build(num_q=7))
    with pytest.raises(ValueError, match=r"here/model is no network of the run that is continued"):
        SaveBest(tmp_path / "here").load_state_dict(earlier.state_dict())


def test_a_score_is_resumed_only_beside_the_network_that_has_it(tmp_path):
    save = SaveBest(tmp_path)
    save.on_validation_epoch_end(at_step(4), validated(build(), 0.5))
    checkpoint = save.state_dict()
    save.on_validation_epoch_end(at_step(8), validated(build(num_q=7), 0.6))
    resumed = SaveBest(tmp_path)
    resumed.load_state_dict(checkpoint)  # the network of step 8 is there, its checkpoint was never written
    resumed.on_validation_epoch_end(at_step(8), validated(build(num_q=8), 0.4))
    assert resumed.best["miou"] == pytest.approx(0.4)
    assert MaskClassificationSemantic.from_pretrained(tmp_path).hparams.num_q == 8


def validated(module, miou):
    module.class_iou, module.scored, module.score = {}, checksums(module), lambda: miou
    return module


def scores(pixels, **facts):
    return Evaluation(pixels * torch.eye(2).long()[None], {"classes": ["a", "b"], **facts})


def test_an_evaluation_that_cannot_be_written_leaves_the_counts_of_the_earlier_one(tmp_path):
    scores(1).save(tmp_path, "target")
    with pytest.raises(TypeError, match="not JSON serializable"):
        scores(2, data=object()).save(tmp_path, "target")
    assert np.load(tmp_path / "target.npz")["confusion"].sum() == 2
    assert sorted(os.listdir(tmp_path)) == ["target.json", "target.npz"]


def logits(value):
    return WindowLogits(torch.full((1, 2, 4, 4), value), torch.zeros(1, 2, 3), [(0, 0)], (16, 16), (16, 16))


def test_logits_that_cannot_be_written_leave_no_file_that_is_taken_for_them(tmp_path, monkeypatch):
    def half(tensors, place, metadata):
        Path(place).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("eomt.anomaly.evaluation.save_file", half)
    with pytest.raises(OSError, match=r"no room for .*: more than 0.0 KiB are needed"):
        LogitCache(tmp_path).write("frame", logits(0.0))
    assert not os.listdir(tmp_path)


def test_a_video_that_ends_in_an_error_leaves_the_earlier_one(tmp_path):
    from PIL import Image

    pytest.importorskip("av")
    frame = Image.new("RGB", (32, 32))
    write_video(tmp_path / "out.mp4", 25, [frame])
    before = (tmp_path / "out.mp4").read_bytes()
    with pytest.raises(ZeroDivisionError):
        write_video(tmp_path / "out.mp4", 25, (frame if k < 2 else 1 / 0 for k in range(3)))
    assert (tmp_path / "out.mp4").read_bytes() == before and os.listdir(tmp_path) == ["out.mp4"]


def test_a_trainer_resumes_from_what_was_saved(tmp_path):
    trainer = lightning.Trainer(logger=False, plugins=[CheckpointFiles()], accelerator="cpu", barebones=False)
    trainer.strategy.checkpoint_io.save_checkpoint({"state_dict": {}, "w": torch.ones(2)}, tmp_path / "last.ckpt")
    assert trainer.strategy.load_checkpoint(tmp_path / "last.ckpt", weights_only=True)["w"].tolist() == [1, 1]


@pytest.mark.parametrize("name", ["eomt_config.json", "adapter_config.json"])
def test_a_half_written_adapter_is_named(tmp_path, name):
    build(use_lora=True).save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / name).write_text('{"init": {')
    with pytest.raises(ValueError, match=rf"adapter/{name} cannot be read: it is no JSON .* half-written"):
        inspect_model(tmp_path / "adapter")


def test_a_half_written_configuration_of_an_artefact_or_run_is_named(tmp_path):
    build().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "eomt_config.json").write_text('{"init": {')
    with pytest.raises(ValueError, match=r"model/eomt_config\.json cannot be read: it is no JSON .* half-written"):
        MaskClassificationSemantic.from_pretrained(tmp_path / "model")
    (tmp_path / "config.yaml").write_text("data: {")
    with pytest.raises(ValueError, match=r"config\.yaml cannot be read: it is no valid YAML .* half-written"):
        data_of_run(tmp_path)


def set_aside(folder):
    """As a writer leaves it that is killed between its two renames."""
    work = folder.with_name(f".{folder.name}.part")
    work.mkdir(exist_ok=True)
    folder.rename(work / "earlier")


def test_an_artefact_that_was_set_aside_when_its_writer_was_killed_opens_and_keeps_its_score(tmp_path):
    build().save_pretrained(tmp_path / "model")
    set_aside(tmp_path / "model")
    resumed = SaveBest(tmp_path)
    resumed.load_state_dict({"best": {"miou": 0.5}, "directory": str(tmp_path)})
    assert resumed.best["miou"] == 0.5 and (tmp_path / "model").is_dir()
    set_aside(tmp_path / "model")
    assert MaskClassificationSemantic.from_pretrained(tmp_path).hparams.num_q > 0


def test_an_artefact_that_has_no_room_is_refused_before_it_is_written(tmp_path, monkeypatch):
    free = namedtuple("usage", "free")(2**10)
    monkeypatch.setattr("eomt.files.shutil.disk_usage", lambda _: free)
    with pytest.raises(
        OSError, match=rf"^there is no room for {tmp_path / 'model'}: 9\d\d\.\d KiB are needed, 1\.0 KiB"
    ):
        SaveBest(tmp_path).save(build())
    with pytest.raises(OSError, match=r"no room for .*last.ckpt: 781.2 KiB are needed, 1.0 KiB are free there"):
        CheckpointFiles().save_checkpoint(
            {"w": [torch.zeros(10**5), {"b": torch.zeros(10**5)}]}, tmp_path / "last.ckpt"
        )
    assert not os.listdir(tmp_path)


def test_a_run_that_goes_on_in_a_folder_that_was_moved_knows_the_score_of_its_best_checkpoint(tmp_path):
    def best_in(name):
        return BestCheckpoint(tmp_path / name / "checkpoints", "best", monitor="val/miou", mode="max")

    path = tmp_path / "first" / "checkpoints" / "best.ckpt"
    first = best_in("first")
    first.best_model_score = first.kth_value = torch.tensor(0.5)
    first.best_model_path = first.kth_best_model_path = str(path)
    first.best_k_models = {str(path): torch.tensor(0.5)}
    path.parent.mkdir(parents=True)
    path.touch()
    (tmp_path / "first").rename(tmp_path / "moved")
    moved = best_in("moved")
    moved.load_state_dict(first.state_dict())
    there = str(tmp_path / "moved" / "checkpoints" / "best.ckpt")
    assert moved.best_model_score == 0.5 and moved.best_model_path == there and [*moved.best_k_models] == [there]
    elsewhere = best_in("elsewhere")  # which has no such checkpoint, so that the next one is the best there
    with pytest.warns(match="dirpath has changed"):
        elsewhere.load_state_dict(first.state_dict())
    assert not elsewhere.best_k_models
