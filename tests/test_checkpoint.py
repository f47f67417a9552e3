"""Weights in every form that users have them, and no silent way to load the wrong ones."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from conftest import REFERENCE
from safetensors.torch import load_file, save_file
from timm.layers import resample_abs_pos_embed

from eomt.models.checkpoint import load_checkpoint, read_checkpoint
from eomt.models.eomt import EoMT
from eomt.models.vit import ViT
from eomt.training.mask_classification_semantic import MaskClassificationSemantic
from lora_config import LoRASettings, apply_lora

DINOV2 = "vit_small_patch14_reg4_dinov2"
TINY = {"embed_dim": 32, "depth": 3, "num_heads": 2}


def build(img_size=(64, 64), patch_size=16, backbone_name=DINOV2, backbone_kwargs=None, **settings):
    """A tiny network, every weight and buffer of it random."""
    encoder = ViT(img_size, patch_size, backbone_name, False, TINY | (backbone_kwargs or {}))
    network = EoMT(encoder, **({"num_classes": 3, "num_q": 6, "num_blocks": 2} | settings))
    for tensor in network.state_dict().values():
        tensor.uniform_(0.1, 1)
    return network.eval()


def published(network):
    """A state dict as the published training code writes it."""
    state = {f"network.{key}": tensor.clone() for key, tensor in network.state_dict().items()}
    return state | {"criterion.empty_weight": torch.ones(4), "metrics.0.confmat": torch.zeros(3, 3)}


def save_bin(directory, state):
    torch.save(state, directory / "pytorch_model.bin")
    return directory / "pytorch_model.bin"


def assert_same(network, source, but=()):
    own, theirs = network.state_dict(), source.state_dict()
    assert own.keys() == theirs.keys()
    different = {key for key in own if own[key].shape != theirs[key].shape or not torch.equal(own[key], theirs[key])}
    assert different == set(but)


@pytest.fixture
def source():
    torch.manual_seed(1)
    return build()


@pytest.fixture
def network():
    torch.manual_seed(2)
    return build()


@pytest.fixture
def checkpoint(source, tmp_path):
    return save_bin(tmp_path, published(source))


# The forms


def test_a_published_bin_loads_and_the_report_counts_every_tensor(source, network, checkpoint):
    report = load_checkpoint(network, checkpoint)
    assert_same(network, source)
    assert len(report.loaded) == len(source.state_dict())
    assert report.skipped == ["criterion.empty_weight", "metrics.0.confmat"]
    assert not report.resampled and not report.reinitialised
    lines = [line.split()[:2] for line in str(report).splitlines()]
    assert lines[1:] == [
        ["loaded", str(len(report.loaded))],
        ["resampled", "0"],
        ["skipped", "2"],
        ["reinitialised", "0"],
        ["attention", "heads:"],  # which such a file does not tell
    ]
    assert "metrics.0.confmat" in str(report) and str(checkpoint) in str(report)


@pytest.mark.parametrize("prefix", ["network._orig_mod.", "_orig_mod.network.", "_orig_mod.", ""])
def test_names_of_a_compiled_or_bare_network_are_understood(source, network, tmp_path, prefix):
    state = {prefix + key: tensor for key, tensor in source.state_dict().items()}
    load_checkpoint(network, save_bin(tmp_path, state))
    assert_same(network, source)


def test_a_lightning_checkpoint_loads(source, network, tmp_path):
    content = {
        "state_dict": published(source),
        "hyper_parameters": {"img_size": (64, 64), "lr": 1e-4},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(3)}}}],
        "epoch": 3,
    }
    torch.save(content, tmp_path / "last.ckpt")
    load_checkpoint(network, tmp_path / "last.ckpt")
    assert_same(network, source)


def test_safetensors_load(source, network, tmp_path):
    save_file(published(source), tmp_path / "model.safetensors")
    load_checkpoint(network, str(tmp_path / "model.safetensors"))
    assert_same(network, source)


def test_half_precision_weights_load_into_a_full_precision_network(source, network, tmp_path):
    state = {key: tensor.half() for key, tensor in published(source).items()}
    load_checkpoint(network, save_bin(tmp_path, state))
    assert_same(network, source.half().float())
    assert network.q.weight.dtype == torch.float32


def module(**settings):
    network = {"num_classes": 3, "num_q": 6, "num_blocks": 2, "pretrained": False, "num_points": 16}
    kwargs = {"img_size": [64, 64], "backbone_name": DINOV2, "backbone_kwargs": TINY}
    return MaskClassificationSemantic(**network | kwargs | settings)


def test_a_folder_of_save_pretrained_loads(network, tmp_path):
    trained = module(img_size=[64, 96])
    trained.save_pretrained(tmp_path / "model")
    state, img_size, *_ = read_checkpoint(tmp_path / "model")
    assert img_size == (64, 96)
    assert state.keys() == trained.network.state_dict().keys()
    network = build(img_size=(64, 96))
    load_checkpoint(network, tmp_path / "model")
    assert_same(network, trained.network)


def test_pixel_statistics_may_be_missing_and_are_then_the_backbones_own(source, network, tmp_path):
    state = {key: tensor for key, tensor in published(source).items() if "pixel_" not in key}
    kept = network.encoder.pixel_mean.clone()
    load_checkpoint(network, save_bin(tmp_path, state))
    assert torch.equal(network.encoder.pixel_mean, kept)


# Configuration and checkpoint must agree


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_blocks": 3}, "num_blocks 2, the configuration says 3: set num_blocks=2"),
        ({"num_q": 7}, "num_q 6, the configuration says 7: set num_q=6"),
        ({"num_classes": 4}, "num_classes 3, the configuration says 4: .*load_ckpt_class_head=false"),
        ({"patch_size": 32}, "patch_size 16, the configuration says 32: set patch_size=16"),
        ({"backbone_kwargs": {"embed_dim": 64}}, "embed_dim 32, the configuration says 64: choose the backbone_name"),
        ({"backbone_kwargs": {"depth": 4}}, "depth 3, the configuration says 4: choose the backbone_name"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_mismatch_is_an_error_that_names_both_values(checkpoint, settings, message):
    network = build(**settings)
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_checkpoint(network, checkpoint)
    assert all(torch.equal(tensor, before[key]) for key, tensor in network.state_dict().items())


def test_a_checkpoint_of_another_backbone_family_is_refused(checkpoint):
    network = build(backbone_name="vit_tiny_patch16_224")
    with pytest.raises(ValueError, match=r"weights are missing there.*are unknown here.*check backbone_name"):
        load_checkpoint(network, checkpoint)


def test_another_shape_of_one_weight_is_refused_by_name(source, network, tmp_path):
    state = published(source)
    state["network.mask_head.0.bias"] = torch.zeros(5)
    with pytest.raises(ValueError, match=r"mask_head.0.bias is \[5\], this network's is \[32\]"):
        load_checkpoint(network, save_bin(tmp_path, state))


@pytest.mark.parametrize("num_classes", [3, 8])
def test_a_fresh_class_head_keeps_everything_else(source, checkpoint, num_classes):
    network = build(num_classes=num_classes)
    fresh = network.class_head.weight.clone()
    report = load_checkpoint(network, checkpoint, load_class_head=False)
    assert_same(network, source, but={"class_head.weight", "class_head.bias"})
    assert torch.equal(network.class_head.weight, fresh)
    assert report.reinitialised == ["class_head.weight", "class_head.bias"]


def test_a_checkpoint_without_class_head_fits_a_fresh_one(source, network, tmp_path):
    state = {key: tensor for key, tensor in published(source).items() if "class_head" not in key}
    load_checkpoint(network, save_bin(tmp_path, state), load_class_head=False)
    assert_same(network, source, but={"class_head.weight", "class_head.bias"})


# Position embeddings


def expect_resampled(network, source, old_grid, new_grid):
    prefix = network.encoder.backbone.pos_embed.shape[1] - new_grid[0] * new_grid[1]
    expected = resample_abs_pos_embed(
        source.encoder.backbone.pos_embed, list(new_grid), list(old_grid), num_prefix_tokens=prefix
    )
    assert_same(network, source, but={"encoder.backbone.pos_embed"})
    torch.testing.assert_close(network.encoder.backbone.pos_embed, expected)


@pytest.mark.parametrize("name", [DINOV2, "vit_tiny_patch16_224"])
def test_position_embeddings_are_resampled_for_another_size(tmp_path, name):
    source, network = build(backbone_name=name), build((96, 128), backbone_name=name)
    report = load_checkpoint(network, save_bin(tmp_path, published(source)))
    assert report.resampled == ["encoder.backbone.pos_embed"]
    expect_resampled(network, source, (4, 4), (6, 8))


def save_with_size(path, network, img_size):
    """The two own forms that say for which image size they were trained."""
    if path.suffix == ".safetensors":
        save_file(published(network), path, {"img_size": json.dumps(img_size)})
    else:
        torch.save({"state_dict": published(network), "hyper_parameters": {"img_size": img_size}}, path)
    return path


own_forms = pytest.mark.parametrize("form", ["model.safetensors", "last.ckpt"])


@own_forms
def test_position_embeddings_of_an_image_that_is_not_square_are_resampled_by_its_size(tmp_path, form):
    source, network = build((32, 96)), build((64, 64))
    load_checkpoint(network, save_with_size(tmp_path / form, source, [32, 96]))
    expect_resampled(network, source, (2, 6), (4, 4))


@own_forms
def test_as_many_patches_in_another_arrangement_are_resampled_too(tmp_path, form):
    source, network = build((32, 128)), build((64, 64))
    report = load_checkpoint(network, save_with_size(tmp_path / form, source, [32, 128]))
    assert report.resampled == ["encoder.backbone.pos_embed"]
    expect_resampled(network, source, (2, 8), (4, 4))


def test_position_embeddings_of_an_unknown_arrangement_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"12 patches are no square.*own img_size"):
        load_checkpoint(build(), save_bin(tmp_path, published(build((32, 96)))))


# Files that hold no network


def test_a_checkpoint_with_missing_weights_is_refused(source, network, tmp_path):
    state = published(source)
    del state["network.q.weight"], state["network.encoder.backbone.blocks.1.attn.qkv.weight"]
    with pytest.raises(
        ValueError, match=r"2 of its \d+ weights are missing there \(.*attn.qkv.weight.*, 0 are unknown"
    ):
        load_checkpoint(network, save_bin(tmp_path, state))


def test_a_checkpoint_with_unknown_weights_is_refused(source, network, tmp_path):
    state = published(source) | {"network.encoder.backbone.extra.weight": torch.ones(1)}
    with pytest.raises(ValueError, match=r"0 of its .*, 1 are unknown here \(encoder.backbone.extra.weight\)"):
        load_checkpoint(network, save_bin(tmp_path, state))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "holds no tensors: nothing would be loaded"),
        ({"state_dict": {}, "epoch": 1}, "holds no tensors: nothing would be loaded"),
        ([torch.ones(1)], "holds a list, not a state dict"),
        (torch.ones(1), "holds a Tensor, not a state dict"),
        ({"model": {"q.weight": torch.ones(1)}}, "holds no tensors"),
        ({"conv1.weight": torch.ones(1)}, "is no EoMT that is known here: it holds conv1.weight; known are"),
        ({"criterion.empty_weight": torch.ones(4)}, "is no EoMT that is known here: it holds criterion.empty_weight"),
    ],
)
def test_loading_nothing_is_an_error(network, tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        load_checkpoint(network, save_bin(tmp_path, content))


@pytest.mark.parametrize("name", ["model.bin", "model.safetensors", ""])
def test_a_missing_file_is_named(network, tmp_path, name):
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_checkpoint(network, tmp_path / name)


@pytest.mark.parametrize("form", ["model.safetensors", "pytorch_model.bin"])
def test_a_half_downloaded_file_is_an_error_that_says_so(source, network, tmp_path, form):
    path = save_with_size(tmp_path / form, source, [64, 64])
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match="half-downloaded"):
        load_checkpoint(network, path)


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.write_text, (Path(self.path), "executed")


def save_pickle(content, path):
    path.write_bytes(pickle.dumps(content, protocol=2))


def load_pickle(path):
    return pickle.loads(path.read_bytes())


def load_trusting(path):
    return torch.load(path, weights_only=False)


@pytest.mark.parametrize(("save", "load_unsafely"), [(torch.save, load_trusting), (save_pickle, load_pickle)])
def test_pickled_objects_are_refused_and_never_executed(source, network, tmp_path, save, load_unsafely):
    trace = tmp_path / "executed"
    path = tmp_path / "model.ckpt"
    save({"state_dict": source.state_dict(), "hyper_parameters": {"network": Trap(trace)}}, path)
    with pytest.raises(ValueError, match="pickled objects, which are never loaded"):
        load_checkpoint(network, path)
    assert not trace.exists()
    load_unsafely(path)
    assert trace.exists()  # the trap was armed


# LoRA


@pytest.fixture(scope="module")
def lora_module():
    return module(use_lora=True, lora_rank=2)


def test_an_adapter_folder_is_refused_with_the_remedy(lora_module, network, tmp_path):
    lora_module.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"is an adapter, not a network: .*from_pretrained"):
        load_checkpoint(network, tmp_path / "adapter")
    with pytest.raises(ValueError, match="checkpoint of a LoRA run"):
        load_checkpoint(network, tmp_path / "adapter" / "adapter_model.safetensors")


def test_the_checkpoint_of_a_lora_run_is_refused_with_the_remedy(lora_module, network, tmp_path):
    content = {"state_dict": lora_module.state_dict()}
    lora_module.on_save_checkpoint(content)
    torch.save(content, tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match=r"checkpoint of a LoRA run.*resume="):
        load_checkpoint(network, tmp_path / "last.ckpt")


def test_weights_do_not_load_into_a_network_that_has_adapters_already(network, checkpoint):
    apply_lora(network.encoder.backbone, LoRASettings(rank=2))
    with pytest.raises(ValueError, match=r"are missing there.*are unknown here"):
        load_checkpoint(network, checkpoint)


# Differences, and DINOv3


def differences(trained, base):
    """What the published code writes of DINOv3 networks: `encoder.*` and buffers as differences, the rest as it is."""
    before = base.state_dict()
    return {
        f"network.{key}": tensor - before[key] if key.startswith("encoder.") else tensor.clone()
        for key, tensor in trained.state_dict().items()
    }


def pretrained_and_trained(**settings):
    """A backbone with norm weights like those of pretrained ones, and a network that was trained from it."""
    base = build(**settings)
    trained = build(**settings)
    for key, tensor in trained.state_dict().items():
        if key.startswith("encoder.backbone."):
            tensor.copy_(base.state_dict()[key] + 0.01 * torch.randn_like(tensor))
        elif "pixel_" in key:
            tensor.copy_(base.state_dict()[key])
    return base, trained


@pytest.mark.parametrize("setting", [True, None])
def test_a_published_file_of_differences_gives_the_trained_network(tmp_path, setting):
    base, trained = pretrained_and_trained()
    path = save_bin(tmp_path, differences(trained, base))
    load_checkpoint(base, path, delta_weights=setting)
    for key, tensor in trained.state_dict().items():
        torch.testing.assert_close(base.state_dict()[key], tensor, atol=1e-6, rtol=0)
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        for ours, theirs in zip(base(image), trained(image), strict=True):
            torch.testing.assert_close(torch.stack(ours), torch.stack(theirs), atol=1e-5, rtol=1e-5)


def test_mask_probabilities_that_are_a_difference_to_ones_are_those_of_a_network_without_masks(tmp_path):
    base, trained = pretrained_and_trained()
    state = differences(trained, base) | {"network.attn_mask_probs": -torch.ones(2)}
    load_checkpoint(base, save_bin(tmp_path, state))
    assert base.attn_mask_probs.tolist() == [0, 0]


@pytest.mark.parametrize("without", ["", "pixel_", "norm"])
@pytest.mark.parametrize("is_difference", [True, False])
def test_delta_weights_that_contradict_the_file_are_refused(tmp_path, is_difference, without):
    base, trained = pretrained_and_trained()
    state = differences(trained, base) if is_difference else published(trained)
    if without == "norm":  # of the backbone they cannot be left out, but say nothing when they are in between
        state |= {key: torch.full_like(t, 0.2) for key, t in state.items() if "norm" in key and "backbone" in key}
    state = {key: t for key, t in state.items() if "pixel_" not in key or without != "pixel_"}
    content = "differences to a pretrained backbone" if is_difference else "whole weights"
    message = f"holds {content}, as norm weights and pixel_std tell.*set delta_weights={str(is_difference).lower()}"
    with pytest.raises(ValueError, match=message):
        load_checkpoint(base, save_bin(tmp_path, state), delta_weights=not is_difference)


def test_signs_that_disagree_are_refused(source, network, tmp_path):
    state = published(source) | {"network.encoder.pixel_std": torch.zeros(1, 3, 1, 1)}
    with pytest.raises(ValueError, match=r"norm weights of the backbone are 0\.\d+ on average and pixel_std is 0"):
        load_checkpoint(network, save_bin(tmp_path, state))


def test_where_the_file_does_not_tell_the_setting_decides(tmp_path):
    state = {
        key: torch.full_like(t, 0.2) if "norm" in key else t
        for key, t in published(build()).items()
        if "pixel_" not in key
    }
    for setting in (True, False):
        network = build()
        before = network.encoder.norm.weight.clone()
        load_checkpoint(network, save_bin(tmp_path, state), delta_weights=setting)
        torch.testing.assert_close(network.encoder.norm.weight, 0.2 + before * setting)


def test_differences_on_a_random_base_are_refused(tmp_path):
    base, trained = pretrained_and_trained()
    path = save_bin(tmp_path, differences(trained, base))
    with pytest.raises(ValueError, match="this backbone is random: set pretrained=true"):
        module(ckpt_path=str(path))


# Two files in one folder, and patch grids of files that do not say their image size


@pytest.mark.parametrize("fitting", ["model.safetensors", "pytorch_model.bin"])
def test_of_two_files_in_a_folder_the_one_that_fits_is_taken(source, network, tmp_path, fitting):
    other = published(build(num_q=7))
    in_safetensors, in_bin = (
        (published(source), other) if fitting == "model.safetensors" else (other, published(source))
    )
    save_file(in_safetensors, tmp_path / "model.safetensors")
    save_bin(tmp_path, in_bin)
    report = load_checkpoint(network, tmp_path)
    assert_same(network, source)
    assert Path(report.path).name == fitting


def test_two_files_of_which_none_fits_are_both_named(network, tmp_path):
    save_file(published(build(num_q=7)), tmp_path / "model.safetensors")
    save_bin(tmp_path, published(build(num_q=8)))
    with pytest.raises(ValueError, match=r"model.safetensors has num_q 7.*pytorch_model.bin has num_q 8"):
        load_checkpoint(network, tmp_path)


def with_smooth_positions(network):
    """Position embeddings as training makes them: those of neighbours are alike."""
    rows, columns = network.encoder.grid_size
    embeddings = network.encoder.backbone.pos_embed.data[0, -rows * columns :]
    y, x = torch.meshgrid(torch.linspace(0, rows / 8, rows), torch.linspace(0, columns / 8, columns), indexing="ij")
    rate = torch.rand(2, embeddings.shape[1], generator=torch.Generator().manual_seed(0)) * 6
    embeddings.copy_(torch.sin(y[..., None] * rate[0] + x[..., None] * rate[1]).flatten(0, 1))
    return network


@pytest.mark.parametrize("size", [(128, 64), (128, 128), (64, 64)])
def test_the_grid_of_a_bare_state_dict_is_worked_out_and_said(tmp_path, size):
    source, network = with_smooth_positions(build((64, 128))), build(size)
    report = load_checkpoint(network, save_bin(tmp_path, published(source)))
    assert "position embeddings were of 4x8 patches" in str(report)
    expect_resampled(network, source, (4, 8), (size[0] // 16, size[1] // 16))


def test_a_bare_state_dict_of_the_same_grid_stays_as_it_is(tmp_path):
    source, network = with_smooth_positions(build((64, 128))), build((64, 128))
    assert not load_checkpoint(network, save_bin(tmp_path, published(source))).resampled
    assert_same(network, source)


def dinov3_state():
    tensors = load_file(REFERENCE / "eomt_dinov3_reference.safetensors")
    return {key.replace("state.", "network."): t for key, t in tensors.items() if key.startswith("state.")}


def dinov3_network():
    encoder = ViT((96, 96), 16, "vit_small_patch16_dinov3_qkvb", False, {"embed_dim": 64, "depth": 5, "num_heads": 2})
    return EoMT(encoder, num_classes=19, num_q=20, num_blocks=3)


def test_published_dinov3_names_are_mapped_and_what_timm_computes_is_skipped(tmp_path):
    backbone, state, network = "network.encoder.backbone.", dinov3_state(), dinov3_network()
    computed = {f"{backbone}patch_embed.mask_token": torch.ones(1, 1, 64)}
    computed |= {f"{backbone}rope_embeddings.inv_freq": torch.ones(8)}
    report = load_checkpoint(network, save_bin(tmp_path, state | computed))
    assert set(report.skipped) == {key.removeprefix("network.") for key in computed}
    block, theirs = network.encoder.blocks[4], f"{backbone}blocks.4."
    query, key, value = block.attn.qkv.weight.chunk(3)
    assert torch.equal(query, state[f"{theirs}attention.q_proj.weight"])
    assert torch.equal(key, state[f"{theirs}attention.k_proj.weight"])
    assert torch.equal(value, state[f"{theirs}attention.v_proj.weight"])
    assert torch.equal(block.attn.v_bias, state[f"{theirs}attention.v_proj.bias"])
    assert torch.equal(block.gamma_1, state[f"{theirs}layer_scale1.lambda1"])
    assert torch.equal(block.mlp.fc2.weight, state[f"{theirs}mlp.down_proj.weight"])
    assert torch.equal(network.encoder.backbone.reg_token, state[f"{backbone}patch_embed.register_tokens"])


@pytest.mark.parametrize("name", "qkv")
def test_a_dinov3_checkpoint_without_one_of_q_k_v_is_refused(tmp_path, name):
    state = dinov3_state()
    del state[f"network.encoder.backbone.blocks.2.attention.{name}_proj.weight"]
    with pytest.raises(ValueError, match=r"1 of its .*missing there \(encoder.backbone.blocks.2.attn.qkv.weight"):
        load_checkpoint(dinov3_network(), save_bin(tmp_path, state))


def test_a_file_of_differences_under_the_published_dinov3_names_gives_the_trained_network(tmp_path):
    backbone, state, network, trained = "network.encoder.backbone.", dinov3_state(), dinov3_network(), dinov3_network()
    torch.manual_seed(0)
    pretrained = {key: 1.1 * t + 0.1 * torch.randn_like(t) for key, t in state.items() if key.startswith(backbone)}
    load_checkpoint(trained, save_bin(tmp_path, state))
    load_checkpoint(network, save_bin(tmp_path, state | pretrained))
    difference = {key: state[key] - t for key, t in pretrained.items()}
    pixels = {f"network.encoder.pixel_{name}": torch.zeros(1, 3, 1, 1) for name in ("mean", "std")}
    load_checkpoint(network, save_bin(tmp_path, state | difference | pixels))
    for key, tensor in trained.state_dict().items():
        torch.testing.assert_close(network.state_dict()[key], tensor, atol=1e-6, rtol=0, msg=key)
