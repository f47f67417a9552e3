"""The module that users name in YAML: what trains, what is saved, and what is refused."""

import json
from types import SimpleNamespace

import lightning
import pytest
import torch
from conftest import TINY
from lightning.pytorch.loggers import CSVLogger
from peft import PeftModel
from safetensors.torch import load_file

from eomt.data.toy_streets import toy_streets
from eomt.inference.artefacts import merge_adapter
from eomt.lora.audit import AuditError
from eomt.lora.methods import update_norms
from eomt.models.vit import ViT
from eomt.training.callbacks import AuditLoRA, SaveBest
from eomt.training.class_scores import iou_per_class, over
from eomt.training.mask_classification_semantic import MaskClassificationSemantic


def build(seed=0, **settings):
    torch.manual_seed(seed)
    return MaskClassificationSemantic(**{**TINY, **settings})


@pytest.fixture
def data(toy_cache):
    return toy_streets(
        str(toy_cache), num_train=8, num_val=3, size=(64, 128), img_size=[64, 128], batch_size=2, num_workers=0
    )


@pytest.fixture
def base(tmp_path):
    """A source network on disk."""
    build().save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def fit(module, data, folder, steps=8, callbacks=(), **trainer):
    settings = {"max_steps": steps, "max_epochs": -1, "precision": "32-true"} | trainer
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        logger=CSVLogger(folder, name="", version=""),
        callbacks=list(callbacks),
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **settings,
    )
    trainer.fit(module, data)
    return trainer


def random_image():
    return torch.randint(0, 256, (1, 3, 64, 128), generator=torch.Generator().manual_seed(1)) / 255


def outputs(module):
    with torch.no_grad(), module.eval().network.deployed():
        mask_logits, class_logits = module.network(random_image())
    return torch.cat([t.flatten() for t in (*mask_logits, *class_logits)])


def trainable(module):
    return {name for name, p in module.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("use_lora", [False, True])
def test_training_lowers_the_loss(data, tmp_path, use_lora):
    module = build(use_lora=use_lora, lr=2e-3, lora_dropout=0.0, warmup_steps=[0.1, 0.1])
    losses = []
    module.log = lambda name, value, **_: losses.append(float(value)) if name == "train/loss" else None
    fit(module, data, tmp_path, steps=24, limit_val_batches=0)
    assert sum(losses[-6:]) < 0.85 * sum(losses[:6])


def test_lora_trains_adapters_queries_and_heads_and_nothing_else():
    names = trainable(build(use_lora=True))
    backbone = {name for name in names if ".backbone." in name}
    assert backbone and all(".lora_" in name for name in backbone)
    assert {name.split(".")[1] for name in names} == {"encoder", "q", "class_head", "mask_head", "upscale"}


@pytest.mark.parametrize("part", ["queries", "class_head", "mask_head", "upscale", "backbone"])
def test_each_part_can_be_frozen(part):
    frozen = trainable(build()) - trainable(build(freeze=[part]))
    prefix = {"queries": "network.q.", "backbone": "network.encoder.backbone."}.get(part, f"network.{part}.")
    assert frozen and all(name.startswith(prefix) for name in frozen)


def test_freezing_the_backbone_leaves_the_adapters_free():
    assert any(".lora_" in name for name in trainable(build(use_lora=True, freeze=["backbone"])))


def test_freezing_everything_is_refused():
    with pytest.raises(ValueError, match="leaves nothing to train"):
        build(freeze=["backbone", "queries", "class_head", "mask_head", "upscale"])


def test_adapters_leave_outputs_unchanged_at_initialisation(base):
    torch.testing.assert_close(
        outputs(build(ckpt_path=base)), outputs(build(ckpt_path=base, use_lora=True)), rtol=0, atol=0
    )


def test_the_state_dict_holds_every_weight_once():
    keys = build(use_lora=True).state_dict().keys()
    assert not [key for key in keys if "base_model" in key or key.startswith("lora")]
    assert "network.encoder.backbone.blocks.0.attn.qkv.lora_A.default.weight" in keys


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}])
def test_an_adapter_is_restored_bit_for_bit(base, data, tmp_path, options):
    module = build(use_lora=True, ckpt_path=base, lr=1e-2, lora_options=options, warmup_steps=[0, 0])
    fit(module, data, tmp_path, callbacks=[AuditLoRA()], limit_val_batches=0)
    module.save_pretrained(tmp_path / "adapter")
    restored = MaskClassificationSemantic.from_pretrained(tmp_path / "adapter")
    assert max(update_norms(restored.backbone).values()) > 0
    assert torch.equal(outputs(module), outputs(restored))
    assert not torch.equal(outputs(module), outputs(build(ckpt_path=base)))
    assert dict(restored.hparams)["use_lora"] is True


def test_a_full_network_is_restored_bit_for_bit_and_trains_on(data, tmp_path):
    module = build()
    module.save_pretrained(tmp_path / "model")
    assert torch.equal(outputs(module), outputs(MaskClassificationSemantic.from_pretrained(tmp_path / "model")))
    assert torch.equal(outputs(module), outputs(build(seed=5, ckpt_path=str(tmp_path / "model"))))


def test_a_checkpoint_spares_the_download_of_pretrained_weights(base):
    assert torch.equal(outputs(build(ckpt_path=base)), outputs(build(ckpt_path=base, pretrained=True)))


def test_pefts_own_loader_reads_the_backbone_part(base, data, tmp_path):
    module = build(use_lora=True, ckpt_path=base, lr=1e-2, warmup_steps=[0, 0])
    fit(module, data, tmp_path, limit_val_batches=0)
    module.save_pretrained(tmp_path / "adapter")
    backbone = build(ckpt_path=base).backbone
    adapted = PeftModel.from_pretrained(backbone, tmp_path / "adapter").eval()
    with torch.no_grad():
        theirs = adapted.base_model.model.forward_features(random_image())
        torch.testing.assert_close(theirs, module.eval().backbone.forward_features(random_image()), rtol=0, atol=0)


def test_another_base_is_refused_by_its_fingerprint(base, tmp_path):
    build(use_lora=True, ckpt_path=base).save_pretrained(tmp_path / "adapter")
    build(seed=7).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="was trained on base weights"):
        MaskClassificationSemantic.from_pretrained(tmp_path / "adapter", ckpt_path=str(tmp_path / "other"))


def test_a_random_base_is_saved_with_its_adapter_because_it_exists_nowhere_else(tmp_path):
    module = build(use_lora=True)
    module.save_pretrained(tmp_path / "adapter")
    assert torch.equal(outputs(module), outputs(MaskClassificationSemantic.from_pretrained(tmp_path / "adapter")))


def test_an_adapter_folder_holds_no_base_weights(base, tmp_path):
    build(use_lora=True, ckpt_path=base).save_pretrained(tmp_path / "adapter")
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "eomt_config.json", "heads.safetensors"}
    assert not [key for key in load_file(tmp_path / "adapter" / "heads.safetensors") if ".backbone." in key]


def test_a_lora_checkpoint_holds_only_what_was_trained_and_resumes(base, data, tmp_path):
    settings = {"use_lora": True, "ckpt_path": base, "lr": 1e-3, "warmup_steps": [0, 0]}
    torch.manual_seed(3)
    module = build(**settings)
    trainer = fit(module, data, tmp_path, steps=4, limit_val_batches=0)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    checkpoint = torch.load(tmp_path / "half.ckpt", weights_only=True)
    assert not [key for key in checkpoint["state_dict"] if "base_layer" in key or key.endswith("norm1.weight")]
    assert "network.attn_mask_probs" in checkpoint["state_dict"]

    resumed = build(**settings)
    trainer = lightning.Trainer(
        max_steps=4, max_epochs=-1, logger=False, enable_progress_bar=False, limit_val_batches=0
    )
    trainer.fit(resumed, data, ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert torch.equal(outputs(module), outputs(resumed))


def test_resuming_on_another_base_or_with_other_adapters_is_refused(base, data, tmp_path):
    settings = {"use_lora": True, "warmup_steps": [0, 0]}
    module = build(ckpt_path=base, **settings)
    fit(module, data, tmp_path, steps=4, limit_val_batches=0).save_checkpoint(tmp_path / "half.ckpt")
    checkpoint = torch.load(tmp_path / "half.ckpt", weights_only=True)
    with pytest.raises(ValueError, match="other weights"):
        build(seed=9, **settings).on_load_checkpoint(checkpoint)
    with pytest.raises(ValueError, match=r'lora_target_modules \["attn.qkv", "attn.proj"\], now it is \["attn.qkv"\]'):
        build(ckpt_path=base, lora_target_modules=["attn.qkv"], **settings).on_load_checkpoint(checkpoint)
    del checkpoint["state_dict"]["network.q.weight"]
    with pytest.raises(ValueError, match=r"does not fit the LoRA configuration: .*network\.q\.weight"):
        build(ckpt_path=base, **settings).on_load_checkpoint(checkpoint)


def test_the_audit_runs_in_training_and_passes(base, data, tmp_path):
    audit = AuditLoRA()
    fit(
        build(use_lora=True, ckpt_path=base, warmup_steps=[2, 2]),
        data,
        tmp_path,
        callbacks=[audit],
        limit_val_batches=0,
    )
    assert audit.audit.complete and all(check["passed"] for check in audit.audit.results.values())
    assert "frozen_unchanged" in audit.audit.results


def test_the_audit_counts_optimiser_steps_and_not_accumulated_batches(base, data, tmp_path):
    audit = AuditLoRA()
    module = build(use_lora=True, ckpt_path=base, warmup_steps=[1, 0], freeze=["class_head"])
    trainer = fit(module, data, tmp_path, steps=2, callbacks=[audit], limit_val_batches=0, accumulate_grad_batches=2)
    assert trainer.global_step == 2 and not audit.audit.complete  # too short to tell, and no false alarm
    assert audit.audit.results["adapters_trained"]["detail"] == "only 2 steps, too few to tell"


def test_a_head_that_is_frozen_behind_the_settings_back_stops_the_run(base, data, tmp_path):
    module = build(use_lora=True, ckpt_path=base, warmup_steps=[0, 0])
    module.network.mask_head.requires_grad_(False)
    with pytest.raises(AuditError, match=r"meant to train, but frozen: mask_head"):
        fit(module, data, tmp_path, callbacks=[AuditLoRA()], limit_val_batches=0)


def freeze_adapters(module):
    for p in module.adapter_parameters():
        p.requires_grad_(False)


def unfreeze_base(module):
    module.backbone.norm.weight.requires_grad_(True)


def early_optimizer(module):
    heads = [
        p for p in module.network.parameters() if p.requires_grad and id(p) not in map(id, module.adapter_parameters())
    ]
    module.configure_optimizers = lambda: torch.optim.AdamW(heads)


def bypass(module):
    layer = module.backbone.blocks[1].attn.qkv
    layer.forward = lambda x: torch.nn.functional.linear(x, layer.base_layer.weight, layer.base_layer.bias)


def load_weights_late(module):
    module.backbone.blocks[0].attn.qkv.base_layer.weight.data.mul_(1.1)


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        (freeze_adapters, "adapters are frozen: .*lora_A"),
        (unfreeze_base, "meant to be frozen, but trainable: .*backbone.norm.weight"),
        (early_optimizer, "not in the optimiser: .*built before the adapters"),
        (bypass, "does not depend on the adapters of blocks.1.attn.qkv"),
        (load_weights_late, "base weights changed after the adapters were applied: blocks.0.attn.qkv.weight"),
    ],
)
def test_a_planted_fault_stops_the_run_before_the_first_step(base, data, tmp_path, fault, sentence):
    module = build(use_lora=True, ckpt_path=base, warmup_steps=[0, 0])
    fault(module)
    with pytest.raises(AuditError, match=sentence):
        fit(module, data, tmp_path, callbacks=[AuditLoRA()], limit_val_batches=0)
    assert module.trainer.global_step == 0


def test_adapters_that_do_not_move_stop_the_run(base, data, tmp_path):
    module = build(use_lora=True, ckpt_path=base, lora_lr=1e-30, warmup_steps=[0, 0])
    with pytest.raises(AuditError, match=r"lora_A|updates"):
        fit(module, data, tmp_path, steps=30, callbacks=[AuditLoRA()], limit_val_batches=0)
    assert module.trainer.global_step <= 20


def test_a_frozen_weight_that_changes_is_found_at_the_end(base, data, tmp_path):
    class Sabotage(lightning.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            if trainer.global_step == 5:
                module.backbone.patch_embed.proj.weight.data[0, 0, 0, 0] += 1

    module = build(use_lora=True, ckpt_path=base, warmup_steps=[0, 0])
    with pytest.raises(AuditError, match=r"frozen tensors changed during training: .*patch_embed.proj.weight"):
        fit(module, data, tmp_path, callbacks=[Sabotage(), AuditLoRA()], limit_val_batches=0)


def test_annealing_fades_the_masks_and_is_off_for_a_trained_network(base, data, tmp_path):
    module = build(warmup_steps=[0, 0])
    assert module.anneals and module.network.attn_mask_probs.tolist() == [1, 1]
    seen = []

    class Watch(lightning.Callback):
        def on_train_batch_end(self, *args):
            seen.append(module.network.attn_mask_probs.tolist())

    fit(module, data, tmp_path, steps=12, limit_val_batches=0, callbacks=[Watch()])
    assert seen[0] == [1, 1] and seen[9][0] == 0 and 0 < seen[9][1] < 1
    assert seen[10:] == [[0, 0], [0, 0]], "the last sixth of a run is without masks"
    tuned = build(ckpt_path=base)
    assert not tuned.anneals and tuned.network.attn_mask_probs.tolist() == [0, 0]


def test_an_annealing_longer_than_the_run_is_refused(data, tmp_path):
    module = build(attn_mask_annealing_start=[2, 4], attn_mask_annealing_end=[4, 4000], warmup_steps=[0, 0])
    with pytest.raises(ValueError, match="from step 4 to 4000 does not end within the run of 8 steps"):
        fit(module, data, tmp_path, limit_val_batches=0)


def test_validation_counts_pixels_at_the_images_own_resolution(data, tmp_path):
    module = build(warmup_steps=[0, 0])
    trainer = fit(module, data, tmp_path, steps=4)
    confusion = torch.zeros(19, 19)
    from eomt.inference.windows import segment

    for image, labels in (data.val_set[i] for i in range(3)):
        prediction = segment(module.network.eval(), image).argmax(0)
        valid = labels != 255
        assert prediction.shape == labels.shape
        confusion += torch.bincount(labels[valid].long() * 19 + prediction[valid], minlength=361).view(19, 19)
    expected = iou_per_class(confusion).nanmean()
    assert trainer.callback_metrics["val/miou"].item() == pytest.approx(expected.item(), abs=1e-6)
    assert list(module.class_pixels.values()) == confusion.sum(1).tolist()


def test_a_class_in_neither_prediction_nor_target_does_not_count():
    confusion = torch.tensor([[3, 1, 0], [0, 4, 0], [0, 0, 0]])
    iou = iou_per_class(confusion)
    assert iou[:2].tolist() == [0.75, 0.8] and torch.isnan(iou[2])


@pytest.fixture
def validating(monkeypatch):
    module = build(num_classes=3, class_names=["road", "car", "sky"])
    monkeypatch.setattr(module, "log", lambda *args, **kwargs: None)
    monkeypatch.setattr(module, "log_dict", lambda *args: None)
    module._trainer = SimpleNamespace(sanity_checking=False, global_step=3)
    return module


def test_the_number_of_classes_in_the_mean_is_told_once_and_warned_of_when_it_changes(validating, caplog):
    caplog.set_level("INFO")
    for predicted in (0, 1, 2, 2):
        validating.confusion.update(torch.full((1, 4), predicted), torch.tensor([[0, 0, 1, 255]]))
        validating.on_validation_epoch_end()
    first, changed = caplog.messages
    assert first == "mIoU over 2 of 3 classes: no validation pixel is labelled or predicted as sky"
    assert changed.startswith("mIoU over 3 of 3 classes, before it was over 2 (sky): ")


def test_a_mean_says_over_how_many_classes_it_is_taken_where_not_over_all():
    assert over({"road": 0.5, "car": None, "sky": float("nan")}) == " over 1 of 3 classes"
    assert over({"road": 0.5, "car": 0.0}) == ""


def test_a_validation_without_a_labelled_pixel_is_an_error_and_no_score(validating):
    validating.confusion.update(torch.zeros(1, 4), torch.full((1, 4), 255))
    with pytest.raises(ValueError, match="validation images have no labelled pixel"):
        validating.on_validation_epoch_end()


def test_a_sanity_check_without_a_labelled_pixel_ends_no_run(validating):
    validating.trainer.sanity_checking = True
    validating.on_validation_epoch_end()
    assert validating.counted is None


def test_the_artefact_is_that_of_the_best_validation(data, tmp_path):
    save = SaveBest(tmp_path / "run")
    module = build(warmup_steps=[0, 0], lr=1e-3)
    trainer = fit(module, data, tmp_path, steps=12, callbacks=[save], check_val_every_n_epoch=1)
    restored = MaskClassificationSemantic.from_pretrained(tmp_path / "run" / "model")
    again = lightning.Trainer(logger=False, enable_progress_bar=False, enable_checkpointing=False, accelerator="cpu")
    assert again.validate(restored, data, verbose=False)[0]["val/miou"] == pytest.approx(save.best["miou"], abs=1e-6)
    assert save.best["miou"] >= trainer.callback_metrics["val/miou"].item()


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ({"lora_rank": 0}, "rank 0"),
        ({"lora_dropout": 1.5}, r"dropout 1\.5"),
        ({"lora_target_modules": ["nothing"]}, "nothing"),
        ({"lora_blocks": 9}, "9"),
        ({"img_size": [10, 10]}, r"try \[16, 16\]"),
        ({"img_size": [100, 130]}, r"try \[96, 128\]"),
        ({"num_blocks": 4}, "depth 3"),
        ({"lr": 0}, "lr 0: must be greater than 0"),
        ({"llrd": 1.2}, "llrd 1.2"),
        ({"num_classes": 255}, "at most 254"),
        ({"class_names": ["road"]}, "1 entries, num_classes is 19"),
        ({"attn_mask_annealing_start": [0.1]}, "1 entries, num_blocks is 2"),
    ],
)
def test_impossible_values_are_refused_in_a_sentence(setting, sentence):
    with pytest.raises(ValueError, match=sentence):
        build(use_lora=True, **setting)


def test_impossible_values_are_refused_before_a_network_is_built(monkeypatch):
    monkeypatch.setattr(ViT, "__init__", lambda *_, **__: pytest.fail("the network was built"))
    with pytest.raises(ValueError, match="rank 0"):
        build(use_lora=True, lora_rank=0)


def test_vit_large_rank_16_fits_the_promised_sizes():
    with torch.device("meta"):
        module = MaskClassificationSemantic(img_size=[640, 640], num_classes=19, pretrained=False, freeze=["backbone"])
    heads = sum(p.numel() for p in module.parameters() if p.requires_grad)
    adapters = 24 * 16 * ((1024 + 3072) + (1024 + 1024))  # A and B of qkv and proj
    assert adapters == 2_359_296 and 4 * adapters < 10e6
    assert 4 * (adapters + heads) < 60e6


def test_the_adapter_configuration_carries_everything_that_was_set(base, tmp_path):
    build(use_lora=True, ckpt_path=base, lora_rank=4, class_names=[f"c{i}" for i in range(19)]).save_pretrained(
        tmp_path / "adapter"
    )
    config = json.loads((tmp_path / "adapter" / "eomt_config.json").read_text())
    assert config["init"]["lora_rank"] == 4 and config["init"]["class_names"][3] == "c3"
    assert config["init"]["ckpt_path"] == base


def test_a_base_in_bf16_gives_the_results_of_float32_bit_for_bit(base, data, tmp_path):
    losses = {}
    for dtype in ("float32", "bfloat16"):
        module = build(use_lora=True, ckpt_path=base, base_dtype=dtype, warmup_steps=[0, 0])
        losses[dtype] = []
        module.log = lambda name, value, dtype=dtype, **_: (
            losses[dtype].append(float(value)) if name == "train/loss" else None
        )
        torch.manual_seed(1)
        fit(module, data, tmp_path / dtype, callbacks=[AuditLoRA()], precision="bf16-mixed", limit_val_batches=0)
        module.save_pretrained(tmp_path / dtype / "adapter")
    assert losses["float32"] == losses["bfloat16"]
    block = module.network.encoder.blocks[0]
    assert block.attn.qkv.base_layer.weight.dtype == block.mlp.fc1.weight.dtype == torch.bfloat16
    assert block.norm1.weight.dtype == module.network.q.weight.dtype == torch.float32
    assert all(p.dtype == torch.float32 for p in module.parameters() if p.requires_grad)
    with pytest.raises(ValueError, match=r"rounded to bfloat16 .* load the saved adapter"):
        merge_adapter(module)
    one, other = (MaskClassificationSemantic.from_pretrained(tmp_path / dtype / "adapter") for dtype in losses)
    assert torch.equal(outputs(one), outputs(other))


def test_a_base_in_bf16_is_refused_where_it_would_change_results(base, data, tmp_path):
    with pytest.raises(ValueError, match=r"precision=bf16-mixed or model\.base_dtype=float32"):
        fit(build(use_lora=True, ckpt_path=base, base_dtype="bfloat16"), data, tmp_path)
    for settings, words in (
        ({"ckpt_path": base}, "without use_lora"),
        ({"use_lora": True}, "random base"),
        ({"use_lora": True, "ckpt_path": base, "lora_options": {"use_dora": True}}, "use_dora"),
    ):
        with pytest.raises(ValueError, match=words):
            build(base_dtype="bfloat16", **settings)


def test_few_parameter_groups_and_one_fused_optimiser(data, tmp_path):
    module = build(llrd=0.8)
    (optimizer,) = fit(module, data, tmp_path, steps=1, limit_val_batches=0).optimizers
    depth = len(module.network.encoder.blocks)
    assert optimizer.defaults["fused"] and len(optimizer.param_groups) <= depth + 2
    params = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(params) == sorted(id(p) for p in module.parameters() if p.requires_grad)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_gradients_are_clipped_for_the_fused_optimiser_in_every_precision(data, tmp_path, precision):
    norms = []

    class Norm(lightning.Callback):
        def on_before_zero_grad(self, trainer, module, optimizer):
            gradients = [p.grad.norm() for p in module.parameters() if p.grad is not None]
            norms.append(torch.stack(gradients).norm().item() if gradients else 0)

    fit(
        build(),
        data,
        tmp_path,
        steps=2,
        callbacks=[Norm()],
        limit_val_batches=0,
        precision=precision,
        gradient_clip_val=0.01,
    )
    assert max(norms) == pytest.approx(0.01, rel=1e-3)


def test_compile_takes_the_blocks_and_the_upscaling():
    network = build(compile=True).network
    parts = (*network.encoder.blocks, network.upscale)
    assert all(part._compiled_call_impl for part in parts) and not build().network.upscale._compiled_call_impl
