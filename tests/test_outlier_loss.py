"""Outlier losses: their formulas and margins, what outliers take no part in, and the check of indices at start."""

import csv
import json
import logging
import math
import os
import subprocess
from pathlib import Path

import lightning
import pytest
import torch
import warm
from conftest import TINY, fit, prediction

from eomt.anomaly.cut_paste import CutPaste
from eomt.anomaly.cutouts import ToyCutOuts
from eomt.data.toy_streets import toy_streets
from eomt.indices import IGNORE, OUTLIER
from eomt.training.callbacks import AuditLoRA
from eomt.training.index_check import check_indices, check_start, indices_of
from eomt.training.mask_classification_loss import MaskClassificationLoss, off_outliers
from eomt.training.mask_classification_semantic import MaskClassificationSemantic
from eomt.training.outlier_loss import OutlierLoss, at_size, mask2anomaly_loss, rba_loss
from eomt.training.trunk_cache import TrunkCache

ROOT = Path(__file__).parent.parent


def build(seed=0, **settings):
    torch.manual_seed(seed)
    return MaskClassificationSemantic(**{**TINY, **settings})


def streets(toy_cache, cut_paste=None):
    return toy_streets(
        str(toy_cache), num_train=8, num_val=3, size=(64, 128), img_size=[64, 128], batch_size=2, num_workers=0,
        scale_range=(1.0, 1.0), cut_paste=cut_paste,
    )  # fmt: skip


@pytest.fixture
def data(toy_cache):
    return streets(toy_cache)


@pytest.fixture
def pasted(toy_cache):
    """Toy streets with an object or more on every training image."""
    return streets(toy_cache, CutPaste(ToyCutOuts(20), probability=1.0, scale="uniform", where="anywhere"))


# Formulas and margins


def pixels(*columns):
    """S [1, K, 1, n] of n pixels, each a list of K scores."""
    return torch.tensor(columns, dtype=torch.float64).T[None, :, None]


def test_rba_is_a_squared_hinge_on_the_sum_of_tanh():
    scores = pixels([1.0, 0.0], [0.5, 0.0], [0.5, 0.5], [0.0, 0.0], [3.0, 3.0])
    labels = torch.tensor([[[0, 1, OUTLIER, OUTLIER, IGNORE]]])
    inlier, outlier = rba_loss(scores, labels, inlier_margin=-0.7, outlier_margin=-0.1)
    assert inlier.item() == pytest.approx((0 + (0.7 - math.tanh(0.5)) ** 2) / 2)
    assert outlier.item() == pytest.approx(((2 * math.tanh(0.5) - 0.1) ** 2 + 0) / 2)


def test_mask2anomaly_pushes_one_minus_the_best_score_to_zero_and_beyond_the_margin():
    scores = pixels([1.0, 0.0], [0.4, 0.2], [0.5, 0.5], [0.1, 0.0], [0.0, 0.0])
    labels = torch.tensor([[[0, 1, OUTLIER, OUTLIER, IGNORE]]])
    inlier, outlier = mask2anomaly_loss(scores, labels, margin=0.75)
    assert inlier.item() == pytest.approx((0 + 0.5 * 0.6**2) / 2)
    assert outlier.item() == pytest.approx((0.5 * 0.25**2 + 0) / 2)


@pytest.mark.parametrize("name", ["rba", "mask2anomaly"])
def test_without_outliers_or_without_inliers_that_term_is_zero(name):
    masks = torch.tensor([[3.0, -3.0], [-3.0, 3.0]]).expand(1, 4, 2, 2)  # claimed and unclaimed pixels: both err
    some = prediction(masks, torch.zeros(1, 4, 3))
    for value, empty in ((0, "outlier"), (OUTLIER, "inlier")):
        terms = OutlierLoss(name, 2)(some, torch.full((1, 8, 8), value, dtype=torch.uint8))
        assert terms[empty].item() == 0 and sum(terms.values()).item() > 0
    assert sum(OutlierLoss(name, 2)(some, torch.full((1, 8, 8), IGNORE, dtype=torch.uint8)).values()).item() == 0


def one_query(certainty):
    """A prediction of one pixel whose only query claims it for class 0 of 19."""
    classes = torch.full((1, 1, 20), -certainty)
    classes[0, 0, 0] = certainty
    return prediction(torch.full((1, 1, 1, 1), certainty), classes)


@pytest.mark.parametrize("name", ["rba", "mask2anomaly"])
def test_the_default_margins_are_met_by_one_sure_query_and_by_none(name):
    inlier, outlier = (torch.full((1, 4, 4), value, dtype=torch.uint8) for value in (0, OUTLIER))
    loss = OutlierLoss(name, 19)
    sure, unsure = one_query(10.0), prediction(torch.full((1, 1, 1, 1), -10.0), torch.zeros(1, 1, 20))
    assert loss(sure, inlier)["inlier"].item() < 1e-6 and loss(sure, outlier)["outlier"].item() > 0.1
    assert loss(unsure, outlier)["outlier"].item() < 1e-6 and loss(unsure, inlier)["inlier"].item() > 0.1


def test_descending_it_empties_outliers_and_fills_inliers():
    torch.manual_seed(0)
    labels = torch.zeros(1, 16, 16, dtype=torch.uint8)
    labels[:, :, 8:] = OUTLIER
    masks, classes = torch.randn(1, 5, 4, 4, requires_grad=True), torch.randn(1, 5, 4, requires_grad=True)
    optimizer = torch.optim.Adam([masks, classes], lr=0.2)
    for name in ("rba", "mask2anomaly"):
        loss = OutlierLoss(name, 3)
        for _ in range(100):
            optimizer.zero_grad()
            terms = loss(prediction(masks, classes), labels)
            sum(terms.values()).backward()
            optimizer.step()
        assert all(term.item() < 0.01 for term in terms.values())


def test_the_weight_scales_both_terms():
    some, labels = prediction(torch.full((1, 2, 2, 2), -2.0), torch.zeros(1, 2, 3)), torch.zeros(1, 2, 2).byte()
    labels[0, 0] = OUTLIER
    light, heavy = OutlierLoss("rba", 2)(some, labels), OutlierLoss("rba", 2, weight=3.0)(some, labels)
    assert all(heavy[name].item() == pytest.approx(3 * light[name].item()) for name in light)
    assert all(term.item() > 0 for term in light.values())


def test_cells_that_are_partly_outlier_count_for_nothing():
    labels = torch.full((1, 4, 8), 3, dtype=torch.uint8)
    labels[0, :2, :4], labels[0, 2:, :3], labels[0, 0, 4] = OUTLIER, OUTLIER, IGNORE
    assert at_size(labels, (2, 4))[0].tolist() == [[OUTLIER, OUTLIER, 3, 3], [OUTLIER, IGNORE, 3, 3]]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"inlier_margin": -19.0}, r"inlier_margin -19.0: .* s = -sum tanh\(S\), which lies between -19 and 0"),
        ({"inlier_margin": 0.5, "outlier_margin": -0.1}, "inlier_margin 0.5: .*between -19 and 0"),
        ({"outlier_margin": 0.1}, "outlier_margin 0.1: .*between -19 and 0"),
        ({"outlier_margin": -20.0}, "outlier_margin -20.0: .*between -19 and 0"),
        ({"inlier_margin": -0.2, "outlier_margin": -0.3}, "inlier_margin -0.2 must be below outlier_margin -0.3"),
        ({"outlier_loss": "mask2anomaly", "outlier_margin": 1.2}, "outlier_margin 1.2: .*between 0 and 1"),
        ({"outlier_loss": "mask2anomaly", "outlier_margin": -0.1}, "outlier_margin -0.1: .*between 0 and 1"),
        ({"outlier_loss": "mask2anomaly", "inlier_margin": 0.1}, "inlier_margin 0.1: .*mask2anomaly has none"),
        ({"outlier_weight": 0}, "outlier_weight 0: must be greater than 0"),
        ({"outlier_loss": "hinge"}, "outlier_loss 'hinge': choose from None, rba, mask2anomaly"),
    ],
)
def test_margins_that_are_never_reached_or_never_violated_are_refused(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        build(**{"outlier_loss": "rba", **settings})


def test_an_inlier_margin_that_no_single_query_reaches_is_worth_a_warning(caplog):
    with caplog.at_level(logging.WARNING):
        OutlierLoss("rba", 19)
        assert not caplog.text
        OutlierLoss("rba", 19, inlier_margin=-0.9)
    assert "inlier_margin -0.9: s is -0.76 where one query is sure" in caplog.text


# Outliers in the other losses


@pytest.fixture
def half():
    """Labels 64x64, the right half an outlier, and predictions 16x16 that differ there, less the cells at its edge."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(4, (2, 64, 64), generator=generator).byte()
    labels[:, :, 32:] = OUTLIER
    left = torch.randn(2, 7, 16, 16, generator=generator)
    classes = torch.randn(2, 7, 5, generator=generator)

    def predict(seed):
        masks = left.clone()
        masks[..., 9:] = 5 * torch.randn(2, 7, 16, 7, generator=torch.Generator().manual_seed(seed))
        return prediction(masks, classes)

    return labels, predict


def test_what_lies_at_outlier_pixels_changes_no_matching_and_no_loss(half):
    labels, predict = half
    loss = MaskClassificationLoss(4, num_points=256, outliers=True)
    found = []
    for seed in (1, 2):
        one = predict(seed)
        torch.manual_seed(0)
        found.append((loss.match([one], labels), loss([one], labels)))
    (matches, terms), (other_matches, other_terms) = found
    assert torch.equal(matches.queries, other_matches.queries) and torch.equal(matches.classes, other_matches.classes)
    assert all(torch.equal(terms[name], other_terms[name]) for name in terms)


def test_cells_within_an_outlier_get_no_gradient_from_masks_and_classes(half):
    labels, predict = half
    one = predict(1)
    masks = one.features.clone().requires_grad_()
    one = one._replace(features=masks)

    def slope(**options):
        torch.manual_seed(0)
        loss = MaskClassificationLoss(4, num_points=256, **options)
        terms = loss([one], labels if options else labels.masked_fill(labels == OUTLIER, IGNORE))
        return torch.autograd.grad(sum(terms.values()).sum(), masks)[0].abs().sum((0, 1, 2))

    ignored, outlying = slope(), slope(outliers=True)
    assert (ignored[9:] > 0).any() and not outlying[9:].any() and (outlying[:8] > 0).all()


def test_points_beside_outliers_are_replaced_by_others_that_are_as_random():
    labels = torch.zeros(2, 40, 40, dtype=torch.uint8)
    labels[0, :, 20:] = OUTLIER
    points = torch.rand(2, 4000, 2, generator=torch.Generator().manual_seed(0))
    chosen = off_outliers(points, labels)
    assert torch.equal(chosen[1], points[1])
    assert chosen[0, :, 0].max() < 19.5 / 40 and chosen[0].mean(0).tolist() == pytest.approx([0.244, 0.5], abs=0.02)
    assert {tuple(p) for p in chosen[0].tolist()} <= {tuple(p) for p in points[0].tolist()}


def test_an_image_of_outliers_trains_no_mask():
    masks = torch.randn(1, 7, 16, 16, requires_grad=True)
    loss = MaskClassificationLoss(4, num_points=64, outliers=True)
    labels = torch.full((1, 64, 64), OUTLIER, dtype=torch.uint8)
    labels[0, 0, 0] = 1  # a class, but no point that is free of outliers
    terms = loss([prediction(masks, torch.randn(1, 7, 5))], labels)
    assert all(term.isfinite().all() for term in terms.values())
    (slope,) = torch.autograd.grad(terms["mask"].sum() + terms["dice"].sum(), masks)
    assert not slope.any()


def test_without_outliers_the_losses_are_what_they_were():
    torch.manual_seed(0)
    labels = torch.randint(4, (2, 32, 32)).byte()
    one = prediction(torch.randn(2, 7, 8, 8), torch.randn(2, 7, 5))
    terms = []
    for outliers in (False, True):
        torch.manual_seed(1)
        terms.append(MaskClassificationLoss(4, num_points=64, outliers=outliers)([one], labels))
    assert all(torch.equal(terms[0][name], terms[1][name]) for name in terms[0])


def test_outliers_without_a_loss_for_them_end_the_run_at_its_start(pasted, caplog):
    with pytest.raises(ValueError, match=r"label 254 .* set model.outlier_loss=rba, or leave data.cut_paste out"):
        fit(build(), pasted)
    labels = torch.full((1, 64, 128), OUTLIER, dtype=torch.uint8)
    with pytest.raises(ValueError, match="label 254"):
        build().criterion([prediction(torch.randn(1, 20, 4, 4), torch.randn(1, 20, 20))], labels)


# Whole runs


@pytest.mark.parametrize("use_lora", [False, True])
def test_every_term_is_logged_and_all_of_them_are_the_loss(pasted, use_lora):
    module = build(outlier_loss="rba", use_lora=use_lora, masked_attn_enabled=False)
    logged = {}
    module.log = lambda name, value, **_: logged.update({name: float(value)})
    module.log_dict = lambda values: logged.update({name: float(value) for name, value in values.items()})
    fit(module, pasted, AuditLoRA(), max_steps=1)
    names = [f"train/{name}" for name in ("mask", "dice", "class", "inlier", "outlier")]
    assert set(logged) == {"train/loss", *names}
    assert logged["train/outlier"] > 0
    assert logged["train/loss"] == pytest.approx(sum(logged[name] for name in names), rel=1e-5)


def test_an_outlier_loss_that_sees_no_outlier_is_worth_a_warning(data, pasted, caplog):
    with caplog.at_level(logging.WARNING):
        check_start(build(outlier_loss="rba"), pasted)
        check_start(build(), data)
        assert "outlier" not in caplog.text
        check_start(build(outlier_loss="rba"), data)
    assert "outlier_loss rba, but data.cut_paste is not set" in caplog.text


def test_margins_without_an_outlier_loss_are_worth_a_warning(caplog):
    with caplog.at_level(logging.WARNING):
        build(outlier_loss="rba", inlier_margin=-0.6)
        assert "do nothing" not in caplog.text
        build(inlier_margin=-0.6)
    assert "inlier_margin and outlier_margin are of outlier_loss, which is null" in caplog.text


def test_pasting_that_finds_no_place_is_worth_a_warning(toy_cache, caplog):
    with caplog.at_level(logging.WARNING):
        check_start(build(outlier_loss="rba"), streets(toy_cache, CutPaste(ToyCutOuts(20), probability=0.01)))
        assert "no place" not in caplog.text
        nowhere = CutPaste(ToyCutOuts(20), road="train")
        check_start(build(outlier_loss="rba"), streets(toy_cache, nowhere))
    assert "data.cut_paste found no place for an object" in caplog.text


def test_a_data_module_of_ones_own_is_left_out_of_the_check_of_labels(data):
    class Own(lightning.LightningDataModule):
        def train_dataloader(self):
            return data.train_dataloader()

    fit(build(), Own(), max_steps=1)


def test_outliers_without_a_loss_are_refused_before_frozen_blocks_are_run(pasted, tmp_path):
    module = build(use_lora=True, lora_blocks=1, lora_dropout=0.0, masked_attn_enabled=False)
    with pytest.raises(ValueError, match="label 254"):
        fit(module, pasted, TrunkCache(views=2, folder=str(tmp_path / "cache")))
    assert not list(tmp_path.rglob("tokens"))


@pytest.mark.parametrize("name", ["rba", "mask2anomaly"])
def test_every_pixel_weighs_the_same_on_however_many_processes(name, monkeypatch):
    """Two processes with a picture each, one of them without outliers, and their mean, against one with both."""
    masks = torch.tensor([[3.0, -3.0], [-3.0, 3.0]]).repeat(2, 4, 1, 1).requires_grad_()
    labels = torch.zeros(2, 2, 2, dtype=torch.uint8)
    labels[1, 0] = OUTLIER
    loss = OutlierLoss(name, 2)

    def gradient(terms):
        return torch.autograd.grad(sum(term.sum() for term in terms.values()), masks)[0]

    whole = gradient(loss(prediction(masks, torch.zeros(2, 4, 3)), labels))
    counts = {0: [4.0, 0.0], 1: [2.0, 2.0]}  # inliers, outliers
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    parts = []
    for rank in (0, 1):
        others = iter(counts[1 - rank])
        monkeypatch.setattr(torch.distributed, "all_reduce", lambda count, others=others: count.add_(next(others)))
        here = prediction(masks[rank : rank + 1], torch.zeros(1, 4, 3))
        parts.append(gradient(loss(here, labels[rank : rank + 1])))
    torch.testing.assert_close(sum(parts) / 2, whole)


def test_outliers_in_validation_images_count_as_little_as_ignored_pixels(data):
    module = build()
    image, labels = data.val_set[0]
    counts = []
    for value in (OUTLIER, IGNORE):
        changed = labels.clone()
        changed[:, 40:] = value
        module.confusion.reset()
        module.validation_step(([image], [changed]), 0)
        counts.append(module.confusion.confmat.clone())
    assert torch.equal(*counts) and 0 < counts[0].sum() <= 64 * 40


def test_it_trains_from_the_output_of_frozen_blocks_with_what_was_pasted_there(pasted, tmp_path):
    module = build(
        outlier_loss="rba", use_lora=True, lora_blocks=1, lora_dropout=0.0, masked_attn_enabled=False
    )  # fmt: skip
    cache = TrunkCache(views=2, folder=str(tmp_path / "cache"))
    fit(module, pasted, cache)
    assert any((cache.cache[0, view][1] == OUTLIER).any() for view in range(2))


def test_its_settings_survive_saving_and_opening(tmp_path):
    settings = {"outlier_loss": "rba", "outlier_weight": 2.0, "inlier_margin": -0.6, "outlier_margin": -0.2}
    build(**settings).save_pretrained(tmp_path / "model")
    module = MaskClassificationSemantic.from_pretrained(tmp_path / "model")
    assert {name: module.hparams[name] for name in settings} == settings
    assert module.criterion.outliers and module.outlier_loss.margins == (-0.6, -0.2)


# Indices


def another_ignore_index(module, data):
    module.confusion.ignore_index = 19


def fewer_classes_in_the_loss(module, data):
    module.criterion.num_classes = 18


def more_outputs_of_the_head(module, data):
    module.network.class_head = torch.nn.Linear(64, 22)


def fewer_classes_in_the_metrics(module, data):
    module.confusion.num_classes = 18


def anomalies_as_class_nineteen(module, data):
    decode = data.train_set.decode_labels

    def planted(*args):
        labels = decode(*args)
        labels[labels == 0] = 19
        return labels

    data.train_set.decode_labels = planted


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        (another_ignore_index, "index 19 is no object in the head and ignored in the metrics"),
        (fewer_classes_in_the_loss, "index 18 is a class in the head and no object in the loss"),
        (more_outputs_of_the_head, "index 19 is a class in the head and no object in the loss"),
        (fewer_classes_in_the_metrics, r"a class is index 0\.\.18 in the head, but index 0\.\.17 in the metrics"),
        (anomalies_as_class_nineteen, r"label 19 in a target, but the classes are 0\.\.18"),
    ],
)
def test_an_index_of_two_meanings_ends_the_run_at_its_start(data, fault, sentence):
    module = build(outlier_loss="rba")
    fault(module, data)
    with pytest.raises(ValueError, match=sentence):
        fit(module, data)


def test_classes_may_not_reach_the_outliers_index():
    parts = indices_of(build(num_classes=254, num_q=2, outlier_loss="rba"), None)
    with pytest.raises(ValueError, match="index 254 is no object in the head and an outlier in the loss"):
        check_indices(parts)
    check_indices(indices_of(build(num_classes=253, num_q=2, outlier_loss="rba"), None))
    check_indices(indices_of(build(num_classes=254, num_q=2), None))


def test_data_with_other_classes_than_the_head_are_found(data):
    with pytest.raises(ValueError, match="index 18 is no object in the head and a class in the data"):
        fit(build(num_classes=18), data)


# The experiments, as a user starts them


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Stands for the network that experiment=toy_source leaves."""
    folder = tmp_path_factory.mktemp("source") / "model"
    build().save_pretrained(folder)
    return folder


SMALL = ["data.num_train=8", "data.num_val=3", "data.size=[64,128]", "data.batch_size=4", "trainer.max_epochs=1"]
SMALL += ["trainer.check_val_every_n_epoch=1", "trainer.log_every_n_steps=1", "callbacks.samples.every_n_epochs=0"]
SMALL += ["data/cut_paste=toy", "data.cut_paste.probability=1.0", "model.img_size=[64,128]", "model.num_blocks=2"]
SMALL += ["model.backbone_kwargs={embed_dim:64,depth:3,num_heads:2}", "model.num_points=64", "model.num_q=20"]


@pytest.mark.parametrize(
    ("variant", "outlier_loss", "head"),
    [
        ("rba", "rba", "linear"),
        ("mask2anomaly", "mask2anomaly", "linear"),
        ("arcface_lora", None, "arcface"),
        ("arcface_rba_lora", "rba", "arcface"),
    ],
)
def test_every_variant_for_anomalies_trains(source, toy_cache, tmp_path, variant, outlier_loss, head):
    words = [word for word in SMALL if outlier_loss or "cut_paste" not in word]
    result = start("experiment=toy_anomalies", f"variant={variant}", f"model.ckpt_path={source}", *words,
                   f"data.root={toy_cache}", f"output_dir={tmp_path / 'run'}")  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "finished" and summary["steps"] == 2
    assert not variant.endswith("_lora") or all(check["passed"] for check in summary["lora_audit"].values())
    init = json.loads((tmp_path / "run" / summary["artefact"] / "eomt_config.json").read_text())["init"]
    assert (init["outlier_loss"], init["head"]) == (outlier_loss, head)
    logged = set(next(csv.reader((tmp_path / "run" / "metrics.csv").open())))
    assert ({"train/inlier", "train/outlier"} <= logged) == (outlier_loss is not None)


def start(*words):
    return subprocess.run(
        [warm.python(), str(ROOT / "train_with_lora.py"), *words],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
