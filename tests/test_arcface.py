"""The ArcFace head: one set of scaled cosines for matcher, loss and inference; the margin in the loss alone."""

import json
import math

import lightning
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, fit, prediction, run_script
from PIL import Image

from eomt.cost.training_cost import training_cost
from eomt.data.toy_streets import toy_streets
from eomt.diagnosis.inspection import inspect_model
from eomt.indices import OUTLIER
from eomt.inference import windows as semantic_inference
from eomt.inference.artefacts import merge_adapter
from eomt.inference.windows import classify
from eomt.models.cosine_head import CosineHead
from eomt.training import mask_classification_loss
from eomt.training.callbacks import AuditLoRA
from eomt.training.mask_classification_loss import MaskClassificationLoss, add_margin
from eomt.training.mask_classification_semantic import MaskClassificationSemantic
from eomt.training.trunk_cache import TrunkCache

ARCFACE = {"head": "arcface", "arcface_scale": 20.0, "arcface_margin": 0.4}
SCALE, MARGIN = 30.0, 0.5


def build(seed=0, **settings):
    torch.manual_seed(seed)
    return MaskClassificationSemantic(**{**TINY, **ARCFACE, **settings})


def random_image(seed=1):
    return torch.randint(0, 256, (3, 64, 128), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def outputs(module):
    with torch.no_grad(), module.eval().network.deployed():
        mask_logits, class_logits = module.network(random_image()[None] / 255)
    return torch.cat([t.flatten() for t in (*mask_logits, *class_logits)])


@pytest.fixture
def data(toy_cache):
    return toy_streets(
        str(toy_cache), num_train=8, num_val=3, size=(64, 128), img_size=[64, 128], batch_size=2, num_workers=0
    )


@pytest.fixture
def linear(tmp_path):
    """A source network with a linear class head."""
    build(head="linear").save_pretrained(tmp_path / "linear")
    return str(tmp_path / "linear")


@pytest.fixture
def cosines():
    """Scaled cosines [2, 7, 5] in float64 of 4 classes and "no object", and what the queries should say."""
    generator = torch.Generator().manual_seed(0)
    cosine = 2 * torch.rand(2, 7, 5, dtype=torch.float64, generator=generator) - 1
    return SCALE * cosine, torch.randint(5, (2, 7), generator=generator)


def test_class_logits_are_scaled_cosines_and_no_object_is_one_of_them():
    head = CosineHead(16, 5, SCALE)
    queries = 7 * torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(0))
    expected = SCALE * F.cosine_similarity(queries[:, :, None].double(), head.weight.double(), dim=-1)
    torch.testing.assert_close(head(queries).double(), expected, rtol=0, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(head(queries), head(queries * 1.0)) and head(queries).dtype == torch.float32
        torch.testing.assert_close(head(queries).double(), expected, rtol=0, atol=1e-5)


def test_the_margin_widens_the_angle_of_the_target_where_it_is_a_known_class(cosines):
    logits, target = cosines
    expected = logits.clone()
    for b in range(2):
        for q in range(7):
            k = target[b, q].item()
            angle = math.acos(logits[b, q, k] / SCALE)
            if k < 4:
                beyond = angle + MARGIN > math.pi
                widened = math.cos(angle) - MARGIN * math.sin(MARGIN) if beyond else math.cos(angle + MARGIN)
                expected[b, q, k] = SCALE * widened
    assert (target == 4).any() and (target < 4).any()
    torch.testing.assert_close(add_margin(logits, target, SCALE, MARGIN), expected, rtol=0, atol=1e-9)


def test_the_logit_falls_with_the_angle_all_the_way_and_has_a_gradient():
    angle = torch.linspace(0, math.pi, 2001, dtype=torch.float64)
    logits = torch.zeros(2001, 5, dtype=torch.float64)
    logits[:, 2] = SCALE * angle.cos()
    logits.requires_grad_()
    widened = add_margin(logits, torch.full((2001,), 2), SCALE, MARGIN)[:, 2]
    assert (widened.diff() < 0).all()
    (slope,) = torch.autograd.grad(widened.sum(), logits)
    assert slope.isfinite().all() and (slope[1:-1, 2] > 0).all()


def random_task(seed=0):
    """Three predictions of one image with four classes in quarters, their class logits scaled cosines."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.zeros(1, 16, 16, dtype=torch.uint8)
    labels[:, :8, 8:], labels[:, 8:, :8], labels[:, 8:, 8:] = 1, 2, 3
    make = [torch.randn(1, 7, 8, 8, generator=generator) for _ in range(3)]
    logits = [SCALE * (2 * torch.rand(1, 7, 5, generator=generator) - 1) for _ in range(3)]
    return [prediction(masks, classes) for masks, classes in zip(make, logits, strict=True)], labels


def terms(predictions, labels, margin):
    torch.manual_seed(0)
    return MaskClassificationLoss(4, num_points=64, scale=SCALE, margin=margin)(predictions, labels)


def test_a_margin_of_zero_equals_a_scaled_softmax(cosines):
    logits, target = cosines
    torch.testing.assert_close(add_margin(logits, target, SCALE, 0.0), logits, rtol=0, atol=1e-9)
    predictions, labels = random_task()
    plain = MaskClassificationLoss(4, num_points=64)
    torch.manual_seed(0)
    expected = plain(predictions, labels)
    found = terms(predictions, labels, 0.0)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    nearly = terms(predictions, labels, 1e-9)["class"]
    torch.testing.assert_close(nearly, expected["class"], rtol=1e-4, atol=1e-4)


def test_the_margin_comes_after_matching_and_raises_the_class_loss_alone():
    predictions, labels = random_task()
    points = torch.rand(1, 64, 2, generator=torch.Generator().manual_seed(0))

    def cost(margin):
        loss, kept = MaskClassificationLoss(4, scale=SCALE, margin=margin), []
        loss.assign = lambda cost, seen: kept.append(cost)
        loss.match(predictions, labels, points)
        return kept[0]

    assert torch.equal(cost(MARGIN), cost(0.0))
    wide, plain = terms(predictions, labels, MARGIN), terms(predictions, labels, 0.0)
    assert torch.equal(wide["mask"], plain["mask"]) and torch.equal(wide["dice"], plain["dice"])
    assert (wide["class"] > plain["class"]).all()


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_checkpointed_predictions_train_the_same_with_a_margin_and_outliers(precision):
    labels = torch.randint(19, (1, 64, 128), generator=torch.Generator().manual_seed(0)).byte()
    labels[:, 30:40, 50:90] = OUTLIER
    losses, slopes = [], []
    for checkpointed in (False, True):
        module = build(outlier_loss="rba", checkpoint_predictions=checkpointed)
        module.log = module.log_dict = lambda *args, **options: None
        torch.manual_seed(1)
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            losses.append(module.training_step((random_image()[None], labels), 0))
        losses[-1].backward()
        slopes.append([p.grad for p in module.parameters() if p.grad is not None])
    assert losses[0].isfinite() and torch.equal(*losses)
    assert len(slopes[0]) > 10 and all(torch.equal(a, b) for a, b in zip(*slopes, strict=True))


def test_matcher_loss_and_inference_see_the_same_logits(monkeypatch):
    seen = {}

    def spy(module, name, argument):
        function = getattr(module, name)

        def wrapper(*args, **kwargs):
            seen[name] = args[argument].detach().clone()
            return function(*args, **kwargs)

        monkeypatch.setattr(module, name, wrapper)

    spy(mask_classification_loss, "matching_cost", 2)
    spy(mask_classification_loss, "add_margin", 0)
    spy(semantic_inference, "score_strips", 1)
    module = build(masked_attn_enabled=False).eval()  # one prediction, the deployed one
    module.log = module.log_dict = lambda *args, **options: None
    queries = []
    module.network.class_head.register_forward_hook(lambda head, inputs, output: queries.append(inputs[0].detach()))
    labels = torch.randint(19, (1, 64, 128), generator=torch.Generator().manual_seed(0)).byte()
    module.training_step((random_image()[None], labels), 0)
    classify(module.network, random_image())
    weight = module.network.class_head.weight.detach()
    expected = 20.0 * F.cosine_similarity(queries[0][0, :, None], weight, dim=-1)
    for logits in (seen["matching_cost"][0], seen["add_margin"][0, 0], seen["score_strips"][0]):
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("there", "here"), [("linear", "arcface"), ("arcface", "linear")])
def test_another_head_than_the_checkpoints_is_refused_and_a_fresh_one_trains(tmp_path, there, here):
    source = build(head=there)
    source.save_pretrained(tmp_path / "source")
    words = rf"has head {there}, the configuration says {here}: set head={there}, or load_ckpt_class_head=false"
    with pytest.raises(ValueError, match=words):
        build(head=here, ckpt_path=str(tmp_path / "source"))
    module = build(1, head=here, ckpt_path=str(tmp_path / "source"), load_ckpt_class_head=False)
    assert torch.equal(module.network.q.weight, source.network.q.weight)
    assert not torch.equal(module.network.class_head.weight, source.network.class_head.weight)


def test_another_scale_than_the_checkpoints_is_refused(tmp_path):
    build().save_pretrained(tmp_path / "source")
    with pytest.raises(ValueError, match=r"arcface_scale 20\.0, the configuration says 30\.0: set arcface_scale=20\.0"):
        build(ckpt_path=str(tmp_path / "source"), arcface_scale=30.0)
    build(ckpt_path=str(tmp_path / "source"))


@pytest.mark.parametrize("use_lora", [False, True])
def test_it_is_saved_opened_and_merged_bit_for_bit(linear, data, tmp_path, use_lora):
    module = build(use_lora=use_lora, ckpt_path=linear, load_ckpt_class_head=False, lr=1e-2, warmup_steps=[0, 0])
    fit(module, data, AuditLoRA())
    module.save_pretrained(tmp_path / "saved")
    restored = MaskClassificationSemantic.from_pretrained(tmp_path / "saved")
    assert torch.equal(outputs(restored), outputs(module))
    assert {name: restored.hparams[name] for name in ARCFACE} == ARCFACE
    facts = inspect_model(tmp_path / "saved")
    assert (facts["network"]["head"], facts["network"]["arcface_scale"]) == ("arcface", 20.0)
    if use_lora:
        merge_adapter(restored)
        restored.save_pretrained(tmp_path / "merged")
        merged = MaskClassificationSemantic.from_pretrained(tmp_path / "merged")
        torch.testing.assert_close(outputs(merged), outputs(module), rtol=0, atol=1e-3)


@pytest.mark.parametrize("use_lora", [False, True])
def test_a_lightning_checkpoint_of_it_opens(linear, data, tmp_path, use_lora):
    module = build(use_lora=use_lora, ckpt_path=linear, load_ckpt_class_head=False)
    trainer = fit(module, data, max_steps=1)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    restored = MaskClassificationSemantic.from_pretrained(tmp_path / "last.ckpt")
    assert torch.equal(outputs(restored), outputs(module))
    with pytest.raises(ValueError, match=r"trained with arcface_margin 0\.4, now it is 0\.1"):
        other = build(use_lora=use_lora, ckpt_path=linear, load_ckpt_class_head=False, arcface_margin=0.1)
        fit_from(other, data, tmp_path / "last.ckpt")


def fit_from(module, data, checkpoint):
    trainer = lightning.Trainer(accelerator="cpu", max_steps=2, logger=False, enable_checkpointing=False)
    trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)


def test_adapters_with_other_heads_do_not_share_a_network(linear, tmp_path):
    settings = {"use_lora": True, "ckpt_path": linear}
    build(head="linear", **settings).save_pretrained(tmp_path / "plain")
    build(load_ckpt_class_head=False, **settings).save_pretrained(tmp_path / "cosine")
    module = MaskClassificationSemantic.from_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="class_head"):
        module.add_adapter(tmp_path / "cosine", "cosine")


def test_the_merge_script_takes_it(linear, tmp_path):
    build(use_lora=True, ckpt_path=linear, load_ckpt_class_head=False).save_pretrained(tmp_path / "adapter")
    Image.fromarray(random_image().permute(1, 2, 0).numpy()).save(tmp_path / "image.png")
    images = ["--images", tmp_path / "image.png"]
    result = run_script("merge_lora.py", tmp_path / "adapter", tmp_path / "merged", *images)
    assert result.returncode == 0, result.stderr
    init = json.loads((tmp_path / "merged" / "eomt_config.json").read_text())["init"]
    assert init["head"] == "arcface" and not init["use_lora"]


@pytest.mark.parametrize("outlier_loss", [None, "rba", "mask2anomaly"])
def test_its_cost_is_known_before_it_trains(outlier_loss):
    settings = {**TINY, **ARCFACE, "outlier_loss": outlier_loss}
    cost = training_cost(settings, 2, precision="32-true", device="cpu")
    assert cost.parameters["class_head"] == 20 * 64 and cost.peak > cost.weights > 0


def test_it_trains_from_the_output_of_frozen_blocks(linear, data, tmp_path):
    module = build(
        use_lora=True, lora_blocks=1, lora_dropout=0.0, masked_attn_enabled=False, ckpt_path=linear,
        load_ckpt_class_head=False,
    )  # fmt: skip
    fit(module, data, TrunkCache(views=1, folder=str(tmp_path / "cache")))
    assert module.cached_blocks == 1 and module.network.q.weight.isfinite().all()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"head": "cosine"}, "head 'cosine': choose from linear, arcface"),
        ({"arcface_scale": 0}, "arcface_scale 0: must be greater than 0"),
        ({"arcface_margin": -0.1}, r"arcface_margin -0.1: an angle in radians, from 0 up to pi / 2"),
        ({"arcface_margin": 28.6}, r"arcface_margin 28.6: an angle in radians"),
    ],
)
def test_impossible_heads_are_refused(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        build(**settings)
