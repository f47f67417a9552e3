"""scripts/convert.py: whatever holds an EoMT becomes what another program reads, and what it does not know is named."""

import json
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_exchange_hf import network_of, picture, their_classes  # noqa: F401
from test_other_programs import (
    CLASSES,
    DINOV3,
    GATED,
    PLAIN,
    REGISTERS,
    assert_same,
    dinov3,
    published_dinov3,
    settings_of,
    theirs_of,
)

from eomt.exchange.adapters import write_adapter
from eomt.exchange.opening import backbone_of, recognised
from eomt.exchange.opening import settings_of as settings_of_file
from eomt.models.checkpoint import load_checkpoint, read_checkpoint
from eomt.settings.eomt_files import describe_file, read_eomt_file
from eomt.training.mask_classification_semantic import MaskClassificationSemantic

transformers = pytest.importorskip("transformers", reason="transformers is not installed: nothing to convert")


@pytest.fixture
def call(call_script):
    return partial(call_script, "convert.py")


def lightly_of(module, path, **changes):
    """The network as LightlyTrain exports one: its names, and the arguments that it is made with."""
    state = {}
    for key, tensor in module.network.state_dict().items():
        if key.startswith("encoder.pixel_") or key == "attn_mask_probs":
            continue
        name = key.replace("q.weight", "queries.weight") if key == "q.weight" else key
        name = name.replace("encoder.backbone.", "backbone.").replace("reg_token", "storage_tokens")
        name = name.replace(".gamma_1", ".ls1.gamma").replace(".gamma_2", ".ls2.gamma")
        if name.endswith((".q_bias", ".v_bias")):
            continue
        state[f"model.{name}"] = tensor
        if name.endswith(".attn.qkv.weight"):
            attn = module.network.get_submodule(key.removesuffix(".qkv.weight"))
            zero, one = torch.zeros_like(attn.q_bias), torch.ones_like(attn.q_bias)
            noise = torch.full_like(zero, 0.3)  # of keys, which the mask takes
            state[f"model.{name.replace('weight', 'bias')}"] = torch.cat((attn.q_bias, noise, attn.v_bias)).detach()
            state[f"model.{name.replace('weight', 'bias_mask')}"] = torch.cat((one, zero, one))
    width = module.network.encoder.embed_dim
    state |= {"model.backbone.mask_token": torch.ones(1, width), "criterion.empty_weight": torch.ones(5)}
    state["model.backbone.rope_embed.periods"] = torch.ones(4)
    made_with = {
        "model_name": "dinov3/vits16-eomt",
        "classes": dict(enumerate(CLASSES)),
        "class_ignore_index": None,
        "image_size": (64, 64),
        "image_normalize": {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)},
        "num_queries": 6,
        "num_joint_blocks": 2,
    }
    content = {"model_class_path": "lightly_train.X", "model_init_args": made_with, "train_model": state}
    torch.save(content | changes, path)
    return path


def test_an_export_of_lightlytrain_loads_with_masks_off_and_what_it_leaves_out_is_named(tmp_path):
    module = network_of(DINOV3)
    path = lightly_of(module, tmp_path / "exported_last.pt")
    other = network_of(DINOV3)
    with torch.no_grad():
        [p.zero_() for p in other.parameters()]
    report = load_checkpoint(other.network, path)
    for key, tensor in module.network.state_dict().items():
        if key != "attn_mask_probs":
            assert torch.equal(other.network.state_dict()[key], tensor), key
    assert (other.network.attn_mask_probs == 0).all()
    assert "LightlyTrain's EoMT: a DINOv3 ViT" in str(report) and "model.backbone.mask_token" in report.skipped
    assert read_checkpoint(path).img_size == (64, 64)


@pytest.mark.parametrize(
    ("made_with", "message"),
    [
        (None, "without its model_init_args"),
        ({"num_joint_blocks": "2"}, "num_joint_blocks '2'"),
        ({"num_joint_blocks": 2, "image_size": 64}, "image_size 64"),
        ({"num_joint_blocks": 2, "classes": ["road"]}, "classes "),
    ],
)
def test_an_export_of_lightlytrain_that_does_not_say_what_is_needed_is_refused(made_with, message, tmp_path):
    path = lightly_of(network_of(DINOV3), tmp_path / "exported_last.pt", model_init_args=made_with)
    with pytest.raises(ValueError, match=message):
        read_checkpoint(path)


def test_an_export_of_lightlytrain_that_upscales_otherwise_is_refused_by_its_name(tmp_path):
    module = network_of(DINOV3)
    path = lightly_of(module, tmp_path / "exported_last.pt")
    content = torch.load(path)
    extra = {k.replace("upscale.1", "upscale.2"): v for k, v in content["train_model"].items() if "upscale.1" in k}
    torch.save(content | {"train_model": content["train_model"] | extra}, path)
    with pytest.raises(ValueError, match=r"is LightlyTrain's EoMT: .* it doubles its features 3 times, .* EoMT 2, so"):
        load_checkpoint(network_of(DINOV3).network, path)


ROUND = [REGISTERS, PLAIN, GATED, pytest.param(DINOV3, marks=dinov3)]


@pytest.mark.parametrize("name", ROUND)
def test_ours_published_and_transformers_give_one_class_map_on_a_street(name, tmp_path, picture, call):  # noqa: F811
    module = network_of(name)
    module.network.attn_mask_probs.zero_()
    module.save_pretrained(tmp_path / "ours")
    expected = module.predict(picture)
    assert len(expected.unique()) > 1
    places = [("ours", "hf", "hf"), ("hf", "eomt", "back"), ("back", "hf", "again")]
    for source, target, out in places:
        code, error = call(tmp_path / source, tmp_path / out, "--to", target)
        assert code == 0, error
    for folder in ("hf", "again"):
        assert (their_classes(tmp_path / folder, picture, backend="pil") == expected).float().mean() > 0.9999
    back = MaskClassificationSemantic.from_pretrained(tmp_path / "back")
    assert back.class_names == CLASSES and back.hparams.class_colors == module.hparams.class_colors
    assert (back.predict(picture) == expected).float().mean() > 0.9999
    theirs, ours = (load_file(tmp_path / folder / "model.safetensors") for folder in ("hf", "back"))
    assert theirs.keys() == load_file(tmp_path / "again/model.safetensors").keys()
    torch.save(published_dinov3(theirs) if name == DINOV3 else ours, tmp_path / "pytorch_model.bin")
    published = MaskClassificationSemantic(**settings_of(name, ckpt_path=str(tmp_path / "pytorch_model.bin")))
    assert (published.predict(picture) == expected).float().mean() > 0.9999


def test_a_published_file_of_a_size_that_no_paper_has_does_not_say_its_heads(tmp_path, call):
    theirs_of(REGISTERS).save_pretrained(tmp_path / "hf")
    state = {f"network.{key}": t.clone() for key, t in read_checkpoint(tmp_path / "hf").tensors.items()}
    torch.save(state, tmp_path / "pytorch_model.bin")
    code, error = call(tmp_path / "pytorch_model.bin", tmp_path / "out", "--to", "eomt")
    assert code == 1 and "do not tell which model of timm's that is, or how many heads" in error


@dinov3
def test_a_published_file_without_an_image_size_asks_for_it(tmp_path):
    theirs_of(DINOV3).save_pretrained(tmp_path / "hf")
    torch.save(published_dinov3(load_file(tmp_path / "hf" / "model.safetensors")), tmp_path / "pytorch_model.bin")
    file = read_eomt_file(tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"does not say for which image size: give --img_size"):
        settings_of_file(file)
    with pytest.raises(ValueError, match=r"how many heads"):
        settings_of_file(file, [64, 64])


SIZES = [(384, 12, 6, "small"), (768, 12, 12, "base"), (1024, 24, 16, "large")]


@pytest.mark.parametrize(("width", "depth", "heads", "size"), SIZES)
def test_every_size_of_transformers_folders_is_known_by_timms_name(width, depth, heads, size, tmp_path):
    config = {"hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": heads, "image_size": 64}
    with torch.device("meta"):
        model = transformers.EomtForUniversalSegmentation(transformers.EomtConfig(**config))
    shapes = {key: list(tensor.shape) for key, tensor in model.state_dict().items()}
    (tmp_path / "config.json").write_text(model.config.to_json_string())
    file = describe_file(tmp_path, [tmp_path / "model.safetensors"], shapes, {})
    assert backbone_of(file) == (f"vit_{size}_patch14_reg4_dinov2", None) and file.said.num_heads == heads


def test_an_adapter_is_merged_before_it_is_written_for_transformers(tmp_path, picture, call):  # noqa: F811
    base = network_of(REGISTERS)
    base.save_pretrained(tmp_path / "base")
    settings = {"use_lora": True, "ckpt_path": str(tmp_path / "base"), "lora_rank": 2}
    module = MaskClassificationSemantic(**{**dict(base.hparams), **settings})
    with torch.no_grad():
        [p.normal_(std=0.2) for p in module.adapter_parameters()]
    module.save_pretrained(tmp_path / "adapter")
    code, error = call(tmp_path / "adapter", tmp_path / "hf", "--to", "hf")
    assert code == 0, error
    same = module.eval().predict(picture) == their_classes(tmp_path / "hf", picture, backend="pil")
    assert same.float().mean() > 0.999


def peft_on_transformers(theirs, folder, **options):
    """Trains nothing: random updates of an adapter that PEFT puts on transformers' network."""
    import peft

    settings = {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "out_proj", "o_proj", "fc1", "up_proj"]}
    adapted = peft.get_peft_model(theirs, peft.LoraConfig(**settings | options))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                p.copy_(0.2 * torch.randn(p.shape, generator=generator))
    adapted.save_pretrained(folder)
    return adapted.eval()


@pytest.mark.parametrize("name", ROUND)
@pytest.mark.parametrize(
    "options",
    [{}, {"use_rslora": True, "modules_to_save": ["class_predictor", "query"], "rank_pattern": {"q_proj": 4}}],
)
def test_an_adapter_on_transformers_network_becomes_ours_exactly(name, options, tmp_path, call):
    theirs = theirs_of(name)
    theirs.save_pretrained(tmp_path / "hf")
    targets = {"target_modules": ["q_proj", "v_proj", "gate_proj"]} if name == GATED else {}
    adapted = peft_on_transformers(theirs, tmp_path / "peft", **options, **targets)
    code, error = call(tmp_path / "peft", tmp_path / "adapter", "--to", "adapter", "--ckpt_path", tmp_path / "hf")
    assert code == 0, error
    module = MaskClassificationSemantic.from_pretrained(tmp_path / "adapter")
    assert module.lora is not None
    assert_same(module.network, adapted)


REFUSED = {
    "use_dora True": {"use_dora": True},
    "alpha_pattern": {"alpha_pattern": {"q_proj": 3}},
    "no lora_A and lora_B of a linear layer": {"target_modules": ["q_proj", "projection"]},
    "which this network has not": {"target_modules": ["q_proj", "query"]},
    "no update of the backbone": {"target_modules": ["mask_head.fc1"]},
    "a weight of the backbone itself": {"modules_to_save": ["layernorm"]},
}


@pytest.mark.parametrize("message", REFUSED)
def test_an_adapter_that_cannot_be_had_exactly_is_refused_by_what_it_is(message, tmp_path):
    theirs = theirs_of(REGISTERS)
    theirs.save_pretrained(tmp_path / "hf")
    peft_on_transformers(theirs, tmp_path / "peft", **REFUSED[message])
    with pytest.raises(ValueError, match=message):
        write_adapter(tmp_path / "peft", tmp_path / "out", tmp_path / "hf")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "named"), [({"r": ...}, "no r"), ({"lora_alpha": "6"}, "lora_alpha '6'"), ({"r": 0}, "r 0")]
)
def test_an_adapter_whose_settings_cannot_be_is_refused_naming_them(changes, named, tmp_path):
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 6} | changes
    (tmp_path / "adapter_config.json").write_text(json.dumps({k: v for k, v in settings.items() if v is not ...}))
    with pytest.raises(ValueError, match=rf"adapter_config\.json.* {named}"):
        write_adapter(tmp_path, tmp_path / "out")


def test_an_adapter_without_its_base_says_what_it_names(tmp_path):
    theirs = theirs_of(REGISTERS)
    peft_on_transformers(theirs, tmp_path / "peft")
    with pytest.raises(ValueError, match=r"names as its base .* which is not there: give .* --ckpt_path"):
        write_adapter(tmp_path / "peft", tmp_path / "out")


def test_what_is_read_is_said_first_and_what_is_unknown_with_what_is_known(tmp_path, call, capsys):
    save_file({"a.weight": torch.ones(2), "b.weight": torch.ones(2)}, tmp_path / "x.safetensors")
    code, error = call(tmp_path / "x.safetensors", tmp_path / "out", "--to", "eomt")
    assert code == 1 and "it holds a.weight, b.weight; known are a published EoMT" in error
    code, error = call(tmp_path / "nothing", tmp_path / "out", "--to", "hf")
    assert code == 1 and "no such file" in error
    network_of(REGISTERS).save_pretrained(tmp_path / "ours")
    assert recognised(tmp_path / "ours") == f"a whole network of this project: {REGISTERS}, 4 classes"
    code, error = call(tmp_path / "ours", tmp_path / "out", "--to", "adapter")
    assert code == 1 and "holds a whole network, and no adapter" in error
    code, error = call(tmp_path / "ours", tmp_path / "ours", "--to", "hf")
    assert code == 1 and "exists and is not empty" in error
    assert not (tmp_path / "out").exists()


USELESS = {
    "--img_size 32 32": ("ours", "eomt", "says its image size itself"),
    "--ckpt_path nowhere": ("hf", "eomt", "is for adapters"),
    "--backbone_weights nowhere": ("hf", "eomt", "is for adapters"),
    "--img_size 32 64": ("adapter", "adapter", "says its image size itself"),
    "--backbone_weights nowhere ": ("peft", "adapter", "has its base in ckpt_path"),
    "--img_size 64 64": ("peft", "adapter", "says its image size itself"),
    "--ckpt_path nowhere ": ("ours", "hf", "is for adapters"),
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """One of each kind of what convert.py reads."""
    folder = tmp_path_factory.mktemp("sources")
    base, theirs = network_of(REGISTERS), theirs_of(REGISTERS)
    base.save_pretrained(folder / "ours")
    settings = {"use_lora": True, "ckpt_path": str(folder / "ours")}
    MaskClassificationSemantic(**{**dict(base.hparams), **settings}).save_pretrained(folder / "adapter")
    theirs.save_pretrained(folder / "hf")
    peft_on_transformers(theirs, folder / "peft")
    return folder


@pytest.mark.parametrize("option", USELESS)
def test_an_option_that_would_do_nothing_is_refused_by_its_name(option, sources, tmp_path, call):
    kind, target, why = USELESS[option]
    code, error = call(sources / kind, tmp_path / "out", "--to", target, *option.split())
    assert code == 1 and option.split()[0].strip("-") in error and why in error
    assert not (tmp_path / "out").exists()


def test_a_merged_adapter_still_says_of_which_adapter_and_base_it_is(sources):
    from eomt.exchange.deployed import Signature, describe
    from eomt.exchange.opening import open_merged

    config = json.loads((sources / "adapter" / "eomt_config.json").read_text())
    facts = describe(open_merged(sources / "adapter"), Signature(), "fp32")
    assert facts["artefact_id"] == config["artefact_id"] and len(facts["artefact_id"]) == 64
    assert facts["base_fingerprint"] == config["base_fingerprint"]
    whole = open_merged(sources / "ours")
    facts = describe(whole, Signature(), "fp32")
    assert facts["artefact_id"] == whole.artefact_id and facts["base_fingerprint"] is None
