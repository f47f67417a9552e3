"""What was trained on one machine opens on another one, whose arithmetic differs in the last bits."""

import json
import os
from functools import partial
from pathlib import Path

import lightning
import other_machine
import pytest
import timm
import torch
from conftest import run_cold
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from eomt.diagnosis.inspection import inspect_model
from eomt.fingerprints import Identity, identify
from eomt.models.resampling import create_resized
from eomt.training.mask_classification_semantic import MaskClassificationSemantic

SMALL = {"embed_dim": 48, "depth": 3, "num_heads": 3}
OTHERS = {"two threads": {"OMP_NUM_THREADS": "2"}, "no vector instructions": {"ATEN_CPU_CAPABILITY": "default"}}


def settings(file, size, kwargs):
    """An EoMT at patches of 16 on pretrained weights in a file, which have patches of 14."""
    overlay = {"file": str(file), "num_classes": 0}
    return {
        "img_size": size,
        "num_classes": 19,
        "num_q": 20,
        "num_blocks": 2,
        "num_points": 64,
        "backbone_name": "vit_small_patch14_dinov2",
        "backbone_kwargs": {**kwargs, "pretrained_cfg_overlay": overlay},
        "pretrained": True,
    }


def small(folder):
    """A small imitation of pretrained weights: 37x37 patches of 14 pixels."""
    torch.manual_seed(3)
    save_file(
        timm.create_model("vit_small_patch14_dinov2", num_classes=0, **SMALL).state_dict(), folder / "vit.safetensors"
    )
    return settings(folder / "vit.safetensors", [64, 128], SMALL)


def real(folder):
    """A real DINOv2 ViT-S/14, from transformers' names to timm's; None where it is not there."""
    root = os.environ.get("EOMT_WEIGHTS")
    if not root:
        return None
    tensors = load_file(Path(root) / "dinov2_vits14_transformers.safetensors")
    tensors, state = {key: tensor.float() for key, tensor in tensors.items()}, {}
    names = {
        "embeddings.cls_token": "cls_token",
        "embeddings.position_embeddings": "pos_embed",
        "embeddings.patch_embeddings.projection": "patch_embed.proj",
        "layernorm": "norm",
        "attention.output.dense": "attn.proj",
        "layer_scale1.lambda1": "ls1.gamma",
        "layer_scale2.lambda1": "ls2.gamma",
    }
    for key, tensor in tensors.items():
        name = key.replace("encoder.layer.", "blocks.")
        for old, new in names.items():
            name = name.replace(old, new) if name.startswith(old) or f".{old}" in name else name
        if ".attention.attention.query." in name:
            parts = [tensors[key.replace("query", part)] for part in ("query", "key", "value")]
            state[name.replace("attention.attention.query", "attn.qkv")] = torch.cat(parts)
        elif ".attention.attention." not in name and "mask_token" not in name:
            state[name] = tensor
    save_file(state, folder / "vit.safetensors")
    return settings(folder / "vit.safetensors", [224, 448], {})


def train(module, factor=0.05):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in module.parameters():
            if p.requires_grad:
                p += factor * torch.randn(p.shape, generator=generator)


def make_run(folder, kind):
    """An adapter and a checkpoint of this machine, and their outputs; None where there are no weights to start from."""
    folder.mkdir()
    if (chosen := kind(folder)) is None:
        return None
    (folder / "settings.json").write_text(json.dumps(chosen))
    module = other_machine.build(chosen, use_lora=True)
    train(module, 0.05 if kind is small else 0.01)
    module.save_pretrained(folder / "adapter")
    trainer = lightning.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", enable_model_summary=False)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(folder / "last.ckpt")
    return folder, chosen, other_machine.outputs(module)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    return {kind.__name__: make_run(root / kind.__name__, kind) for kind in (small, real)}


@pytest.fixture(params=["small", "real"])
def trained(request, runs):
    if runs[request.param] is None:
        pytest.skip("EOMT_WEIGHTS names no folder with pretrained weights")
    return runs[request.param]


@pytest.fixture(scope="module", params=OTHERS)
def others(request, runs):
    """What the other machine found in each folder: facts, and outputs of adapter, checkpoint and resumed run."""
    folders = {name: run[0] for name, run in runs.items() if run}
    result = run_cold("tests/other_machine.py", *folders.values(), **OTHERS[request.param])
    assert result.returncode == 0, result.stderr[-3000:]
    return {
        name: (json.loads((folder / "other.json").read_text()), torch.load(folder / "outputs.pt"))
        for name, folder in folders.items()
    }


@pytest.fixture
def other(trained, others):
    return others[trained[0].name]


def identity(facts):
    return Identity.from_dict(facts["exact"], facts)


def test_adapter_checkpoint_and_resumed_run_open_on_another_machine_with_the_same_outputs(trained, other):
    for found in other[1]:
        assert (found - trained[2]).abs().max() <= 1e-4 * trained[2].abs().max()


def test_start_weights_and_batches_of_two_machines_are_the_same_but_for_rounding(trained, other):
    start = identity(other_machine.start(other_machine.build(trained[1])))
    assert start.difference(identity(other[0]["start"])) is None
    batches = identity(other_machine.batches())
    assert batches.difference(identity(other[0]["batches"]), 0.01) is None
    another_seed = json.loads(json.dumps(other[0]["start"]))
    torch.manual_seed(1)
    module = MaskClassificationSemantic(**trained[1])
    assert "differs by" in identity(other_machine.start(module)).difference(identity(another_seed))


def open_with(folder, tmp_path, edit=None, **changes):
    """Opens the folder's adapter on pretrained weights that were edited, or with other settings."""
    state = load_file(folder / "vit.safetensors")
    if edit:
        edit(state)
    save_file(state, tmp_path / "vit.safetensors")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for file in (folder / "adapter").iterdir():
        (adapter / file.name).write_bytes(file.read_bytes())
    config = json.loads((adapter / "eomt_config.json").read_text())
    config["init"]["backbone_kwargs"]["pretrained_cfg_overlay"]["file"] = str(tmp_path / "vit.safetensors")
    config["init"].update(changes)
    (adapter / "eomt_config.json").write_text(json.dumps(config))
    return MaskClassificationSemantic.from_pretrained(adapter)


@pytest.mark.parametrize("name", ["pos_embed", "patch_embed.proj.weight", "blocks.1.attn.qkv.weight"])
def test_published_weights_that_differ_in_one_number_are_refused_as_other_weights(trained, tmp_path, name):
    def edit(state):
        state[name].view(-1)[7] += 1e-4

    with pytest.raises(ValueError, match="other weights: fingerprint"):
        open_with(trained[0], tmp_path, edit)


def test_the_same_weights_at_another_size_are_refused_by_their_sizes(trained, tmp_path):
    with pytest.raises(ValueError, match=r"same weights at other sizes: pos_embed is \[1, .*trained on \[1, "):
        open_with(trained[0], tmp_path, img_size=[128, 128])


def test_another_way_of_resampling_is_told_from_other_weights(trained, tmp_path):
    module = other_machine.build(trained[1])
    recorded = identify(module.backbone)
    assert "resampled" not in recorded.as_dict() and set(recorded.computed) == {"pos_embed", "patch_embed.proj.weight"}
    with torch.no_grad():
        module.backbone.pos_embed *= 1 + 1e-7  # rounding
    assert recorded.difference(identify(module.backbone)) is None
    with torch.no_grad():
        module.backbone.pos_embed[:, 1:] += 0.01 * module.backbone.pos_embed[:, 1:].roll(1, 1)
    assert "as stored, but pos_embed was resampled otherwise" in recorded.difference(identify(module.backbone))


def forget_the_record(adapter):
    """Makes an adapter one of an earlier version, which recorded SHA-256 of every bit alone."""
    config = json.loads((adapter / "eomt_config.json").read_text())
    del config["base_weights"]
    (adapter / "eomt_config.json").write_text(json.dumps(config))
    file = adapter / "adapter_model.safetensors"
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    del metadata["base_weights"]
    save_file(load_file(file), file, metadata)


def test_an_adapter_of_an_earlier_version_opens_where_every_bit_agrees_and_says_so_elsewhere(trained, tmp_path):
    module = other_machine.build(trained[1], use_lora=True)
    train(module)
    module.save_pretrained(tmp_path)
    forget_the_record(tmp_path)
    assert torch.equal(other_machine.opened(tmp_path), other_machine.outputs(module))
    config = json.loads((tmp_path / "eomt_config.json").read_text())
    (tmp_path / "eomt_config.json").write_text(json.dumps(config | {"base_fingerprint": "0" * 64}))
    with pytest.raises(
        ValueError, match=r"trained on 000000000000; .*patch_embed.proj.weight and pos_embed were resampled"
    ):
        other_machine.opened(tmp_path)


def test_inspection_finds_a_base_that_was_resampled_on_another_machine(trained, tmp_path):
    module = other_machine.build(trained[1])
    module.save_pretrained(tmp_path / "base")
    chosen = trained[1] | {"img_size": [128, 128], "pretrained": False, "ckpt_path": str(tmp_path / "base")}
    adapted = other_machine.build(chosen, use_lora=True)
    adapted.save_pretrained(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "eomt_config.json").read_text())
    edited = json.dumps(config | {"base_fingerprint": "0" * 64})  # as the bits of another machine
    (tmp_path / "adapter" / "eomt_config.json").write_text(edited)
    fit = inspect_model(tmp_path / "adapter")["fit"]
    assert fit["fits"] is True and "position embeddings resampled to 128x128" in fit["why"]
    config["base_weights"]["stored"] = "1" * 64
    (tmp_path / "adapter" / "eomt_config.json").write_text(json.dumps(config | {"base_fingerprint": "0" * 64}))
    assert "trained on 111111111111" in inspect_model(tmp_path / "adapter")["fit"]["why"]


def test_what_is_drawn_after_the_backbone_does_not_depend_on_where_its_weights_came_from(runs):
    kwargs = runs["small"][1]["backbone_kwargs"]
    create = partial(timm.create_model, "vit_small_patch14_dinov2", pretrained=True, num_classes=0, **kwargs)
    drawn = []
    for compare in (False, True):
        torch.manual_seed(0)
        create_resized(create, compare, img_size=(64, 128), patch_size=16)
        drawn.append(torch.rand(4))
    assert torch.equal(*drawn)
