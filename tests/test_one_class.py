"""One class beside an ignored background: it trains, is scored, saved and predicted."""

import numpy as np
import pytest
import torch
from conftest import TINY, fit
from PIL import Image

from eomt.data.datamodule import SegmentationDataModule
from eomt.data.dataset import SegmentationDataset
from eomt.data.labels import LabelSet
from eomt.data.sources import IndexDecoder, Sample, Source
from eomt.files import read_json
from eomt.indices import IGNORE
from eomt.reporting.evaluation_report import write_confusion
from eomt.reporting.sample_pictures import SamplePictures
from eomt.training.callbacks import SaveBest
from eomt.training.evaluation import evaluate
from eomt.training.mask_classification_semantic import MaskClassificationSemantic

CLASSES = LabelSet(("thing",), ((255, 0, 0),))


@pytest.fixture
def data(tmp_path):
    samples = []
    for index in range(3):
        image, mask = (Source(str(tmp_path / f"{index}{end}.png")) for end in ("", "_mask"))
        labels = np.full((64, 64), 255, np.uint8)
        labels[10:30, 10 + index : 40] = 1
        Image.fromarray(labels + index).convert("RGB").save(image.path)
        Image.fromarray(labels).save(mask.path)
        samples.append(Sample(str(index), image, mask))
    train, val = (
        SegmentationDataset(part, CLASSES, IndexDecoder({1: 0, 255: IGNORE}, "")) for part in (samples[1:], samples[:1])
    )
    return SegmentationDataModule(train, val, (64, 64), batch_size=2, num_workers=0, class_weights="inverse")


@pytest.mark.parametrize("head", ["linear", "arcface"])
def test_one_class_trains_and_is_scored_drawn_saved_and_predicted(data, tmp_path, head):
    settings = TINY | {"img_size": [64, 64], "num_classes": 1, "class_names": ["thing"], "head": head}
    module = MaskClassificationSemantic(**settings, class_weights=data.class_weights)
    best, pictures = SaveBest(tmp_path), SamplePictures(tmp_path / "samples")
    trainer = fit(module, data, best, pictures, limit_val_batches=1.0)
    assert trainer.callback_metrics["val/miou"] == 1 and best.best["class_iou"] == {"thing": 1}
    saved = MaskClassificationSemantic.from_pretrained(tmp_path / "model")
    evaluation = evaluate(saved, data, "32-true", "cpu")
    evaluation.save(tmp_path, "scores")
    write_confusion(evaluation, tmp_path / "confusion.csv", "one class")
    assert read_json(tmp_path / "scores.json")["miou_classes"] == 1
    assert evaluation.miou == 1 and evaluation.confusion.shape == (1, 1, 1)
    assert not saved.predict(torch.zeros(3, 64, 64, dtype=torch.uint8)).any()
    assert (
        len(list(tmp_path.glob("samples/*.png"))) == 2
        and (tmp_path / "samples" / "kept.png").exists()
        and (tmp_path / "confusion.png").exists()
    )


def test_a_data_set_without_a_labelled_pixel_is_not_scored(data):
    Image.fromarray(np.full((64, 64), 255, np.uint8)).save(data.val_set.samples[0].label.path)
    module = MaskClassificationSemantic(**TINY | {"img_size": [64, 64], "num_classes": 1, "class_names": ["thing"]})
    with pytest.raises(ValueError, match="no labelled pixel, so nothing can be scored"):
        evaluate(module, data, "32-true", "cpu")
