"""Whole networks of other programs: what they hold is loaded and computes the same, or is refused by its name."""

import json
import logging
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file
from torch import nn

from benchmarks.peer import published_dinov3
from eomt.diagnosis.inspection import inspect_model
from eomt.models.checkpoint import load_checkpoint, read_checkpoint
from eomt.models.eomt import EoMT
from eomt.models.vit import ViT
from eomt.settings.compose import compose_run, name_backbone
from eomt.training.mask_classification_semantic import MaskClassificationSemantic
from train_with_lora import check_composed

transformers = pytest.importorskip("transformers", reason="transformers is not installed: nothing to compare with")
dinov3 = pytest.mark.skipif(
    not hasattr(transformers, "EomtDinov3ForUniversalSegmentation"), reason="this transformers has no EoMT on DINOv3"
)

REGISTERS, PLAIN, GATED = "vit_small_patch14_reg4_dinov2", "vit_small_patch14_dinov2", "vit_giant_patch14_reg4_dinov2"
DINOV3, DINOV3_GATED = "vit_small_patch16_dinov3_qkvb", "vit_small_plus_patch16_dinov3_qkvb"
KINDS = {  # our backbone: what transformers' configuration says of it
    REGISTERS: {},
    PLAIN: {"num_register_tokens": 0},
    GATED: {"use_swiglu_ffn": True},
    DINOV3: {"intermediate_size": 192},
    DINOV3_GATED: {"intermediate_size": 192, "use_gated_mlp": True},
}
CLASSES = ["road", "sky", "tree", "car"]
SAME = [pytest.param(name, marks=dinov3 if "dinov3" in name else ()) for name in KINDS if name != DINOV3_GATED]


def scatter(module, seed=0):
    """Makes every weight random, far from where libraries let them begin; without attention masks, as trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.copy_(0.2 * torch.randn(p.shape, generator=generator) + float("norm" in name and "weight" in name))
        module.attn_mask_probs.zero_()
    return module.eval()


def theirs_of(name, classes=CLASSES, queries=6, size=64, **options):
    """transformers' network with random weights."""
    sizes = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3, "num_blocks": 2, "image_size": size}
    kind = "EomtDinov3" if "dinov3" in name else "Eomt"
    labels = {"id2label": dict(enumerate(classes)), "label2id": {label: i for i, label in enumerate(classes)}}
    config = getattr(transformers, f"{kind}Config")(
        **(sizes | {"num_queries": queries, **labels} | KINDS[name] | options)
    )
    return scatter(getattr(transformers, f"{kind}ForUniversalSegmentation")(config))


def settings_of(name, **changes):
    """Ours for the same network."""
    ratio = {"mlp_ratio": 4 * 4 / 3} if name == GATED else {}
    kwargs = {"embed_dim": 48, "depth": 3, "num_heads": 3, **ratio}
    sizes = {"img_size": [64, 64], "num_classes": 4, "num_q": 6, "num_blocks": 2, "num_points": 64}
    return {**sizes, "backbone_name": name, "backbone_kwargs": kwargs, "pretrained": False} | changes


def outputs(network, images=None):
    """Of transformers' network, or of ours, on images in [0, 1]."""
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)) if images is None else images
    mean, std = (torch.tensor(values)[:, None, None] for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        if not isinstance(network, EoMT):
            found = network((images - mean) / std)
            return found.masks_queries_logits, found.class_queries_logits
        masks, classes = network.eval()(images)
        return masks[-1], classes[-1]


def assert_same(network, theirs, tolerance=1e-5):
    for ours, expected in zip(outputs(network), outputs(theirs), strict=True):
        assert expected.std() > 0.1
        torch.testing.assert_close(ours, expected, atol=tolerance * expected.abs().max().item(), rtol=0)


@pytest.mark.parametrize("name", SAME)
def test_a_folder_of_transformers_loads_by_its_place_alone_and_computes_the_same(name, tmp_path):
    theirs = theirs_of(name)
    theirs.save_pretrained(tmp_path)
    for path in (tmp_path, tmp_path / "model.safetensors"):
        module = MaskClassificationSemantic(**settings_of(name, ckpt_path=str(path)))
        assert_same(module.network, theirs)


def test_attention_masks_that_have_not_faded_are_those_of_transformers(tmp_path):
    theirs = theirs_of(REGISTERS)
    theirs.attn_mask_probs.fill_(1)
    theirs.save_pretrained(tmp_path)
    encoder = ViT((64, 64), 16, REGISTERS, False, {"embed_dim": 48, "depth": 3, "num_heads": 3})
    network = EoMT(encoder, 4, 6, 2)
    report = load_checkpoint(network, tmp_path)
    assert_same(network, theirs)
    assert report.num_heads == 3 and report.skipped == ["criterion.empty_weight"]
    assert "transformers' EoMT" in str(report)


def test_a_folder_in_parts_and_a_file_of_torch_are_the_same(tmp_path):
    theirs = theirs_of(REGISTERS)
    theirs.save_pretrained(tmp_path / "parts", max_shard_size="100KB")
    assert (tmp_path / "parts" / "model.safetensors.index.json").exists()
    (tmp_path / "bin").mkdir()
    torch.save(theirs.state_dict(), tmp_path / "bin" / "pytorch_model.bin")
    for name in ("parts", "bin"):
        module = MaskClassificationSemantic(**settings_of(REGISTERS, ckpt_path=str(tmp_path / name)))
        assert_same(module.network, theirs)


def test_positions_are_resampled_from_the_size_that_the_config_says(tmp_path):
    theirs_of(REGISTERS, size=96).save_pretrained(tmp_path)
    module = MaskClassificationSemantic(**settings_of(REGISTERS, ckpt_path=str(tmp_path)))
    assert module.network.encoder.backbone.pos_embed.shape[1] == 16
    assert read_checkpoint(tmp_path).img_size == (96, 96)


@dinov3
def test_a_gated_dinov3_of_transformers_which_computes_something_else_is_refused_saying_what(tmp_path):
    theirs_of(DINOV3_GATED).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"ckpt_path .* is transformers' EoMT: a DINOv3 ViT.*one activation"):
        MaskClassificationSemantic(**settings_of(DINOV3_GATED, ckpt_path=str(tmp_path)))


@dinov3
def test_the_norms_of_transformers_dinov3_are_taken_over_and_saved(tmp_path, caplog):
    theirs = theirs_of(DINOV3)  # 1e-6, timm's are 1e-5
    theirs.save_pretrained(tmp_path / "hf")
    with caplog.at_level(logging.INFO):
        module = MaskClassificationSemantic(**settings_of(DINOV3, ckpt_path=str(tmp_path / "hf")))
    assert "layer_norm_eps 1e-06" in caplog.text and module.hparams.backbone_kwargs["norm_eps"] == 1e-6
    module.save_pretrained(tmp_path / "model")
    assert_same(MaskClassificationSemantic.from_pretrained(tmp_path / "model").network, theirs)
    with pytest.raises(ValueError, match=r"has norm_eps 1e-06, the configuration says 1e-05: set backbone_kwargs"):
        kwargs = settings_of(DINOV3)["backbone_kwargs"] | {"norm_eps": 1e-5}
        MaskClassificationSemantic(**settings_of(DINOV3, ckpt_path=str(tmp_path / "hf"), backbone_kwargs=kwargs))


@dinov3
def test_the_published_dinov3_and_transformers_give_the_same_network(tmp_path):
    theirs = theirs_of(DINOV3, layer_norm_eps=1e-5)
    theirs.save_pretrained(tmp_path / "hf")
    one = MaskClassificationSemantic(**settings_of(DINOV3, ckpt_path=str(tmp_path / "hf")))
    torch.save(published_dinov3(theirs.state_dict()), tmp_path / "pytorch_model.bin")
    other = MaskClassificationSemantic(**settings_of(DINOV3, ckpt_path=str(tmp_path / "pytorch_model.bin")))
    for key, tensor in other.state_dict().items():
        assert torch.equal(tensor, one.state_dict()[key]), key
    assert_same(other.network, theirs)


@pytest.mark.parametrize("form", ["hf", "bin", "safetensors"])
def test_a_panoptic_network_starts_a_semantic_one_with_its_queries_and_a_new_class_head(form, tmp_path, caplog):
    theirs = theirs_of(REGISTERS, classes=[f"thing {i}" for i in range(9)], queries=14)
    theirs.save_pretrained(tmp_path)
    path = tmp_path
    if form != "hf":
        state = {f"network.{key}": t.clone() for key, t in read_checkpoint(tmp_path).tensors.items()}
        path = tmp_path / f"published.{form}"
        torch.save(state, path) if form == "bin" else save_file(state, path)
    settings = settings_of(REGISTERS, ckpt_path=str(path))
    whose = "transformers' EoMT: .* and has" if form == "hf" else "has"
    start = "load_ckpt_class_head=false starts from it, with its queries and a fresh class head"
    for queries in (6, 14):
        with pytest.raises(ValueError, match=rf"{whose} num_classes 9, the configuration says 4: .*{start}"):
            MaskClassificationSemantic(**settings | {"num_q": queries})
    with caplog.at_level(logging.INFO):
        module = MaskClassificationSemantic(**settings, load_ckpt_class_head=False)
    assert "has 14 queries, which are taken over" in caplog.text and "class_head.weight" in caplog.text
    assert module.network.num_q == module.hparams.num_q == module.settings.num_q == 14
    assert module.network.num_classes == 4 and torch.equal(module.network.q.weight, theirs.query.weight)
    torch.testing.assert_close(outputs(module.network)[0], outputs(theirs)[0], atol=1e-4, rtol=0)  # the masks


def test_the_queries_that_are_taken_over_stand_in_the_configuration_of_the_run(tmp_path):
    theirs_of(REGISTERS, queries=14).save_pretrained(tmp_path)
    words = ["experiment=toy_source", f"model.ckpt_path={tmp_path}", "model.load_ckpt_class_head=false"]
    config = compose_run(words)
    name_backbone(config)
    assert config.model.num_q == 14


def test_a_run_goes_on_with_the_queries_that_it_took_over(tmp_path):
    theirs_of(REGISTERS, queries=14).save_pretrained(tmp_path)
    torch.save({"optimizer_states": [], "hyper_parameters": {"num_q": 14}}, tmp_path / "last.ckpt")
    words = ["experiment=toy_source", f"model.ckpt_path={tmp_path}", "model.load_ckpt_class_head=false"]
    check_composed(compose_run([*words, f"resume={tmp_path / 'last.ckpt'}"]))


@pytest.mark.parametrize("use_lora", [False, True])
def test_what_starts_from_a_folder_of_transformers_is_saved_and_opened_again(use_lora, tmp_path):
    theirs = theirs_of(REGISTERS)
    theirs.save_pretrained(tmp_path / "hf")
    module = MaskClassificationSemantic(**settings_of(REGISTERS, ckpt_path=str(tmp_path / "hf"), use_lora=use_lora))
    module.save_pretrained(tmp_path / "saved")
    assert_same(MaskClassificationSemantic.from_pretrained(tmp_path / "saved").network, theirs)
    if use_lora:
        assert inspect_model(tmp_path / "saved")["fit"]["fits"]


def test_inspecting_says_whose_network_it_is(tmp_path):
    theirs_of(REGISTERS).save_pretrained(tmp_path)
    facts = inspect_model(tmp_path)
    assert facts["kind"].startswith("transformers' EoMT: a DINOv2 ViT") and facts["network"]["num_q"] == 6
    assert facts["parts"]["backbone"]["tensors"] > 40


CONTRADICTIONS = {
    "num_queries": 7,
    "hidden_size": 96,
    "num_hidden_layers": 4,
    "num_blocks": 3,
    "patch_size": 14,
    "num_register_tokens": 0,
    "hidden_act": "relu",
    "id2label": {"0": "a"},
    "model_type": "eomt_dinov3",
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_a_config_that_contradicts_its_weights_is_refused_naming_both(name, tmp_path):
    theirs_of(REGISTERS).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {name: CONTRADICTIONS[name]}))
    with pytest.raises(ValueError, match=rf"config.json says {name} "):
        read_checkpoint(tmp_path)


@dinov3
@pytest.mark.parametrize("entries", [{"rope_theta": 10000.0}, {"rope_parameters": {"rope_theta": 10000.0}}])
def test_other_rotary_periods_are_refused_in_either_spelling_of_transformers(entries, tmp_path):
    theirs_of(DINOV3).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config = {name: value for name, value in config.items() if not name.startswith("rope_")}
    (tmp_path / "config.json").write_text(json.dumps(config | entries))
    with pytest.raises(ValueError, match=r"config.json says rope_theta 10000\.0"):
        read_checkpoint(tmp_path)


IMPOSSIBLE = [
    ("config.json", "image_size", "64"),
    ("config.json", "image_size", [64]),
    ("config.json", "num_attention_heads", "3"),
    ("config.json", "layer_norm_eps", "small"),
    ("config.json", "id2label", ["road"]),
    ("config.json", "id2label", {"a": "road"}),
    ("config.json", "rope_parameters", 3),
    ("config.json", "rope_theta", "100"),
    ("config.json", "class_colors", [3]),
    ("preprocessor_config.json", "image_mean", 0.5),
]


@pytest.mark.parametrize(("file", "name", "value"), IMPOSSIBLE)
def test_values_that_a_config_cannot_have_are_named_with_it(file, name, value, tmp_path):
    theirs_of(REGISTERS).save_pretrained(tmp_path)
    config = json.loads((tmp_path / file).read_text()) if (tmp_path / file).exists() else {}
    (tmp_path / file).write_text(json.dumps(config | {name: value}))
    with pytest.raises(ValueError, match=rf"{file}: {name} "):
        MaskClassificationSemantic(**settings_of(REGISTERS, ckpt_path=str(tmp_path)))


def test_pixels_are_normalised_as_the_image_processor_says(tmp_path):
    theirs_of(REGISTERS).save_pretrained(tmp_path)
    said = {"image_mean": [0.5, 0.25, 0.125], "image_std": [1.0, 0.5, 0.25]}
    for more, mean in (({}, 0.25), ({"do_normalize": False}, 0)):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(said | more))
        module = MaskClassificationSemantic(**settings_of(REGISTERS, ckpt_path=str(tmp_path)))
        assert module.network.encoder.pixel_mean[0, 1].item() == mean


@pytest.mark.parametrize("heads", [2, 4])
def test_another_number_of_heads_than_the_config_says_is_refused(heads, tmp_path):
    theirs_of(REGISTERS).save_pretrained(tmp_path)
    kwargs = {"embed_dim": 48, "depth": 3, "num_heads": heads}
    with pytest.raises(ValueError, match=rf"has num_heads 3, the configuration says {heads}"):
        MaskClassificationSemantic(**settings_of(REGISTERS, backbone_kwargs=kwargs, ckpt_path=str(tmp_path)))


def test_a_weight_that_another_network_would_have_is_refused_saying_what_the_file_is(tmp_path):
    theirs_of(REGISTERS).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"holds transformers' EoMT: a DINOv2 ViT 48 wide.* with 4 registers"):
        MaskClassificationSemantic(**settings_of(PLAIN, ckpt_path=str(tmp_path)))
    state = load_file(tmp_path / "model.safetensors")
    del state["layers.1.attention.k_proj.weight"]
    save_file(state | {"more": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"1 of its .* missing there \(.*blocks.1.attn.qkv.weight.*, 3 are unknown"):
        MaskClassificationSemantic(**settings_of(REGISTERS, ckpt_path=str(tmp_path)))


def test_files_that_are_no_eomt_are_named_with_what_is_known(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    torch.save(model.state_dict(), tmp_path / "resnet.pth")
    (tmp_path / "mask2former").mkdir()
    save_file({"model.pixel_level_module.a": torch.ones(2)}, tmp_path / "mask2former" / "model.safetensors")
    config = {"architectures": ["Mask2FormerForUniversalSegmentation"], "model_type": "mask2former"}
    (tmp_path / "mask2former" / "config.json").write_text(json.dumps(config))
    for name, message in (
        ("resnet.pth", r"is no EoMT that is known here: it holds 0.bias, 0.weight, 1.bias, ...; known are a published"),
        ("mask2former", r"is no EoMT, but Mask2FormerForUniversalSegmentation, as the config.json beside it says"),
    ):
        with pytest.raises(ValueError, match=message):
            MaskClassificationSemantic(**settings_of(REGISTERS, ckpt_path=str(tmp_path / name)))


def test_what_a_safetensors_file_is_is_said_without_torch(tmp_path):
    theirs_of(REGISTERS).save_pretrained(tmp_path)
    code = "import sys; sys.modules['torch'] = None; from eomt.settings.eomt_files import read_eomt_file as r;"
    result = subprocess.run(
        [sys.executable, "-c", f"{code} print(r({str(tmp_path)!r}))"], cwd=ROOT, capture_output=True
    )
    assert result.stdout.decode().startswith("transformers' EoMT: a DINOv2 ViT 48 wide"), result.stderr.decode()


@dinov3
def test_transformers_names_without_their_config_are_refused_where_timms_norms_are_others(tmp_path):
    theirs_of(DINOV3).save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"transformers' EoMT without its config.json.*norm_eps: 1e-06"):
        MaskClassificationSemantic(**settings_of(DINOV3, ckpt_path=str(tmp_path)))
    kwargs = settings_of(DINOV3)["backbone_kwargs"] | {"norm_eps": 1e-6}
    module = MaskClassificationSemantic(**settings_of(DINOV3, ckpt_path=str(tmp_path), backbone_kwargs=kwargs))
    assert module.network.encoder.norm.eps == 1e-6


def test_transformers_names_without_their_config_are_warned_of(tmp_path, caplog):
    theirs_of(REGISTERS).save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    MaskClassificationSemantic(**settings_of(REGISTERS, ckpt_path=str(tmp_path)))
    assert "without its config.json" in caplog.text and "timm's" in caplog.text
