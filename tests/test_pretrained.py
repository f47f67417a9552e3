"""What a run leaves behind opens again, from every form it has; several adapters share one base."""

import json
import shutil

import lightning
import pytest
import torch
from conftest import TINY
from safetensors.torch import save_file

from eomt.fingerprints import fingerprint
from eomt.inference.artefacts import merge_adapter
from eomt.lora.methods import update_norms
from eomt.training.mask_classification_semantic import MaskClassificationSemantic
from lora_config import adapted_layers

NAMES = [f"class {i}" for i in range(19)]


def build(seed=0, **settings):
    torch.manual_seed(seed)
    return MaskClassificationSemantic(**{**TINY, **settings})


def trained(seed=1, **settings):
    """A network as after training: everything that may change has changed."""
    module = build(**settings)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            if p.requires_grad:
                p += 0.05 * torch.randn(p.shape, generator=generator)
    return module.eval()


def outputs(module):
    image = torch.randint(0, 256, (1, 3, 64, 128), generator=torch.Generator().manual_seed(1)) / 255
    with torch.no_grad(), module.network.deployed():
        mask_logits, class_logits = module.network(image)
    return torch.cat([t.flatten() for t in (*mask_logits, *class_logits)])


def save_lightning(module, path):
    """Lightning's own checkpoint of a module, without training it."""
    trainer = lightning.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", enable_model_summary=False)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(path)
    return path


def edit_state(path, edit):
    checkpoint = torch.load(path, weights_only=True)
    edit(checkpoint["state_dict"])
    torch.save(checkpoint, path)


open_ = MaskClassificationSemantic.from_pretrained


@pytest.fixture
def base(tmp_path):
    """A source network on disk."""
    trained(seed=3).save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


@pytest.fixture
def two(base, tmp_path):
    """Two different adapters of one base, which adapt other layers; the folders, and each one's outputs alone."""
    settings = {"night": {"lora_rank": 4}, "fog": {"lora_blocks": 2, "lora_target_modules": ["qkv", "fc1"]}}
    for seed, (name, own) in enumerate(settings.items()):
        trained(seed, use_lora=True, ckpt_path=base, **own).save_pretrained(tmp_path / name)
    return {name: tmp_path / name for name in settings}


@pytest.mark.parametrize("settings", [{}, {"use_lora": True}, {"use_lora": True, "freeze": ["mask_head"]}])
def test_a_lightning_checkpoint_opens_bit_for_bit(base, tmp_path, settings):
    module = trained(ckpt_path=base, **settings)
    restored = open_(save_lightning(module, tmp_path / "best.ckpt"))
    assert torch.equal(outputs(restored), outputs(module)) and not restored.training
    assert dict(restored.hparams) == dict(module.hparams)
    assert not torch.equal(outputs(restored), outputs(build(ckpt_path=base).eval()))


def test_a_restored_checkpoint_is_saved_as_the_adapter_it_was(base, tmp_path):
    module = trained(use_lora=True, ckpt_path=base)
    open_(save_lightning(module, tmp_path / "best.ckpt")).save_pretrained(tmp_path / "adapter")
    assert torch.equal(outputs(open_(tmp_path / "adapter")), outputs(module))


def test_a_lora_checkpoint_is_refused_on_another_base(base, tmp_path):
    path = save_lightning(trained(use_lora=True, ckpt_path=base), tmp_path / "best.ckpt")
    trained(seed=8).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"best\.ckpt was trained on base weights"):
        open_(path, str(tmp_path / "other"))


@pytest.mark.parametrize("use_lora", [False, True])
@pytest.mark.parametrize(
    "edit", [lambda s: s.pop("network.q.weight"), lambda s: s.update({"network.extra": torch.zeros(1)})]
)
def test_a_checkpoint_with_a_weight_too_few_or_too_many_is_refused(base, tmp_path, use_lora, edit):
    path = save_lightning(trained(use_lora=use_lora, ckpt_path=base), tmp_path / "best.ckpt")
    edit_state(path, edit)
    with pytest.raises(ValueError, match=r"does not fit this network: 1 weights differ, network\."):
        open_(path)


@pytest.mark.parametrize("name", ["published.safetensors", "pytorch_model.bin", "epoch.ckpt"])
def test_weights_without_a_configuration_are_sent_to_the_command_that_takes_them(tmp_path, name):
    state = build().network.state_dict()
    save_file(state, tmp_path / name) if name.endswith("safetensors") else torch.save(state, tmp_path / name)
    with pytest.raises(ValueError, match=rf"variant=none model\.ckpt_path=.*{name}"):
        open_(tmp_path / name)


def test_the_checkpoint_of_a_run_on_random_weights_asks_for_them(tmp_path):
    module = trained(use_lora=True)
    module.save_pretrained(tmp_path / "adapter")
    path = save_lightning(module, tmp_path / "best.ckpt")
    with pytest.raises(ValueError, match=r"random.*ckpt_path=\.\.\./adapter/base\.safetensors"):
        open_(path)
    restored = open_(path, str(tmp_path / "adapter" / "base.safetensors"))
    assert torch.equal(outputs(restored), outputs(module))


def test_a_checkpoint_whose_frozen_heads_are_stored_nowhere_is_refused(tmp_path):
    module = trained(use_lora=True, freeze=["class_head"])
    path = save_lightning(module, tmp_path / "best.ckpt")
    edit = torch.load(path, weights_only=True)
    edit["hyper_parameters"]["pretrained"] = True
    torch.save(edit, path)
    with pytest.raises(ValueError, match=r"leaves out the heads that its run froze"):
        open_(path)


def test_the_precision_of_the_run_is_kept_and_older_files_have_none(base, tmp_path):
    module = build(ckpt_path=base)
    trainer = lightning.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", precision="bf16-mixed")
    trainer.strategy.connect(module)
    module.trainer = trainer
    module.save_pretrained(tmp_path / "model")
    assert json.loads((tmp_path / "model" / "eomt_config.json").read_text())["precision"] == "bf16-mixed"
    restored = open_(tmp_path / "model")
    assert restored.trained_precision == "bf16-mixed"
    restored.save_pretrained(tmp_path / "again")
    assert open_(tmp_path / "again").trained_precision == "bf16-mixed"

    file = tmp_path / "model" / "eomt_config.json"
    config = json.loads(file.read_text())
    del config["precision"]
    file.write_text(json.dumps(config))
    assert open_(tmp_path / "model").trained_precision is None


def test_a_run_folder_means_what_it_holds(base, tmp_path):
    module = trained(use_lora=True, ckpt_path=base)
    module.save_pretrained(tmp_path / "run" / "adapter")
    assert torch.equal(outputs(open_(tmp_path / "run")), outputs(module))
    build().save_pretrained(tmp_path / "run" / "model")
    with pytest.raises(ValueError, match=r"both adapter/ and model/"):
        open_(tmp_path / "run")


def test_paths_that_are_none_are_answered_with_the_remedy(base, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such file or folder; did you mean base\?"):
        open_(tmp_path / "bsae")
    with pytest.raises(FileNotFoundError, match=r"give the adapter/ or model/ folder"):
        open_(tmp_path)
    with pytest.raises(ValueError, match=r"give its folder"):
        open_(tmp_path / "base" / "model.safetensors")
    with pytest.raises(ValueError, match=r"holds a whole network: leave it out"):
        open_(base, base)
    (tmp_path / "half.ckpt").write_bytes(b"PK half")
    with pytest.raises(ValueError, match=r"half-written"):
        open_(tmp_path / "half.ckpt")


@pytest.mark.parametrize("form", ["folder", "checkpoint"])
def test_a_base_that_moved_is_asked_for_and_its_new_place_remembered(base, tmp_path, form):
    module = trained(use_lora=True, ckpt_path=base)
    module.save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" if form == "folder" else save_lightning(module, tmp_path / "best.ckpt")
    shutil.move(base, tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match=r"was trained from .*base, which is not there: give"):
        open_(path)
    restored = open_(path, str(tmp_path / "moved"))
    assert torch.equal(outputs(restored), outputs(module))
    restored.save_pretrained(tmp_path / "again")
    assert torch.equal(outputs(open_(tmp_path / "again")), outputs(module))


# The id of what was saved


@pytest.mark.parametrize("use_lora", [False, True])
def test_an_id_belongs_to_weights_and_settings_and_no_place(base, tmp_path, use_lora):
    module = trained(use_lora=use_lora, ckpt_path=base)
    saved = module.save_pretrained(tmp_path / "one")
    assert saved == module.artefact_id == open_(tmp_path / "one").artefact_id and len(saved) == 64
    assert open_(save_lightning(module, tmp_path / "best.ckpt")).artefact_id == saved
    shutil.copytree(base, tmp_path / "moved")
    again = open_(tmp_path / "one", str(tmp_path / "moved")) if use_lora else open_(tmp_path / "one")
    assert again.save_pretrained(tmp_path / "again") == saved
    with torch.no_grad():
        module.network.q.weight[0, 0] += 1e-3
    assert module.save_pretrained(tmp_path / "two") != saved


@pytest.mark.parametrize("use_lora", [False, True])
def test_what_was_changed_since_it_was_saved_is_refused(base, tmp_path, use_lora):
    module = trained(use_lora=use_lora, ckpt_path=base)
    for name in ("bytes", "setting"):
        module.save_pretrained(tmp_path / name)
    file = tmp_path / "bytes" / ("heads.safetensors" if use_lora else "model.safetensors")
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    config = json.loads((tmp_path / "setting" / "eomt_config.json").read_text())
    config["init"]["class_names"] = NAMES
    (tmp_path / "setting" / "eomt_config.json").write_text(json.dumps(config))
    for name in ("bytes", "setting"):
        with pytest.raises(ValueError, match=rf"{name} is no longer what was saved: its .*safetensors"):
            open_(tmp_path / name)


@pytest.mark.parametrize("form", ["model", "last.ckpt"])
def test_weights_of_another_number_of_heads_are_refused_although_every_shape_fits(tmp_path, form):
    module = trained()
    module.save_pretrained(tmp_path / "model")
    save_lightning(module, tmp_path / "last.ckpt")
    kwargs = {**TINY["backbone_kwargs"], "num_heads": 4}
    with pytest.raises(ValueError, match=r"has num_heads 2, the configuration says 4: choose the backbone_name"):
        build(ckpt_path=str(tmp_path / form), backbone_kwargs=kwargs)
    build(ckpt_path=str(tmp_path / form))


def test_adapters_of_one_base_keep_their_ids(two):
    module = open_(two["night"])
    ids = {name: open_(folder).artefact_id for name, folder in two.items()}
    module.add_adapter(two["fog"], "fog")
    for name, folder in (("fog", "fog"), ("default", "night")):
        module.use_adapter(name)
        assert module.artefact_id == ids[folder]
    merge_adapter(module)
    assert module.artefact_id is None


# Several adapters on one base


def test_switching_predicts_as_each_adapter_alone_and_reads_no_base_twice(base, two):
    alone = {name: outputs(open_(folder)) for name, folder in two.items()}
    norms = {name: update_norms(open_(folder).backbone) for name, folder in two.items()}
    module = open_(two["night"])
    before, places = fingerprint(module.backbone), base_places(module)
    module.add_adapter(two["fog"], "fog")
    assert module.adapter_names == ["default", "fog", "base"]
    assert torch.equal(outputs(module), alone["night"])  # adding alone changes nothing
    source = outputs(open_(base))
    for name, expected in [
        ("fog", alone["fog"]),
        ("default", alone["night"]),
        ("base", source),
        ("fog", alone["fog"]),
        ("fog", alone["fog"]),
    ]:
        module.use_adapter(name)
        assert torch.equal(outputs(module), expected), name
    assert not torch.equal(alone["night"], alone["fog"]) and not torch.equal(source, alone["fog"])
    assert update_norms(module.backbone) == norms["fog"]
    assert base_places(module) == places and fingerprint(module.backbone) == before


def base_places(module):
    state = module.backbone.state_dict()
    return {key.replace(".base_layer.", "."): t.data_ptr() for key, t in state.items() if ".lora_" not in key}


def test_adapters_of_other_kinds_share_a_base(base, tmp_path):
    kinds = {"plain": {}, "dora": {"use_dora": True}, "rslora": {"use_rslora": True}}
    for seed, (name, options) in enumerate(kinds.items()):
        module = trained(seed, use_lora=True, ckpt_path=base, lora_options=options)
        module.save_pretrained(tmp_path / name)
    module = open_(tmp_path / "plain")
    for name in ("dora", "rslora"):
        module.add_adapter(tmp_path / name, name)
    for name in ("rslora", "dora"):
        module.use_adapter(name)
        assert torch.equal(outputs(module), outputs(open_(tmp_path / name))), name


def test_the_adapter_in_use_is_the_one_that_is_saved_and_merged(two, tmp_path):
    expected = outputs(open_(two["fog"]))
    module = open_(two["night"])
    module.add_adapter(two["fog"], "fog")
    module.use_adapter("fog")
    module.save_pretrained(tmp_path / "saved")
    assert torch.equal(outputs(open_(tmp_path / "saved")), expected)
    config = json.loads((tmp_path / "saved" / "eomt_config.json").read_text())
    assert config["init"]["lora_target_modules"] == ["qkv", "fc1"]
    merge_adapter(module)
    torch.testing.assert_close(outputs(module), expected, rtol=1e-4, atol=1e-4)
    assert not adapted_layers(module) and module.adapter_names == []


def test_names_that_resemble_one_another_are_kept_apart(two, tmp_path):
    module = open_(two["night"])
    for name, folder in (("fog", two["fog"]), ("fog2", two["night"])):
        module.add_adapter(folder, name)
    module.use_adapter("fog")
    module.save_pretrained(tmp_path / "saved")
    assert torch.equal(outputs(open_(tmp_path / "saved")), outputs(open_(two["fog"])))


def test_switching_leaves_adapters_frozen_and_keeps_changed_heads(two):
    module = open_(two["night"])
    module.add_adapter(two["fog"], "fog")
    for name, other in (("default", "fog"), ("fog", "default")):
        module.use_adapter(name)
        with torch.no_grad():
            module.network.q.weight += 1
        changed = outputs(module)
        module.use_adapter(other)
        module.use_adapter(name)
        assert torch.equal(outputs(module), changed)
    assert not any(p.requires_grad for p in module.adapter_parameters())


def test_adding_while_the_base_is_in_use_leaves_it_in_use(base, two):
    module = open_(two["night"])
    module.use_adapter("base")
    module.add_adapter(two["fog"], "fog")
    assert torch.equal(outputs(module), outputs(open_(base)))
    with pytest.raises(ValueError, match="no adapter is in use"):
        module.save_pretrained(two["fog"].parent / "none")


@pytest.mark.parametrize("name", ["default", "base", "blocks", "attn", "lora_A", "train", "a.b", "1st", ""])
def test_names_that_are_taken_or_impossible_are_refused(two, name):
    module = open_(two["night"])
    with pytest.raises(ValueError, match=rf"adapter name '{name}'"):
        module.add_adapter(two["fog"], name)
    assert module.adapter_names == ["default", "base"]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"class_names": NAMES}, r"agree in class_names: here it is null, .*class 3"),
        ({"num_classes": 5, "load_ckpt_class_head": False}, r"agree in num_classes: here it is 19, in .*odd 5"),
    ],
)
def test_adapters_for_other_classes_are_refused_with_both_values(base, two, tmp_path, settings, sentence):
    trained(use_lora=True, ckpt_path=base, **settings).save_pretrained(tmp_path / "odd")
    with pytest.raises(ValueError, match=sentence):
        open_(two["night"]).add_adapter(tmp_path / "odd", "odd")


def test_an_adapter_of_another_base_or_with_other_tensors_leaves_the_module_as_it_was(two, tmp_path):
    trained(use_lora=True, seed=9).save_pretrained(tmp_path / "other")
    file = two["fog"] / "adapter_config.json"
    file.write_text(file.read_text().replace('"blocks.1.mlp.fc1",', ""))
    module = open_(two["night"])
    before = outputs(module)
    with pytest.raises(ValueError, match="was trained on other base weights"):
        module.add_adapter(tmp_path / "other", "other")
    with pytest.raises(ValueError, match=r"does not fit this module .*fc1"):
        module.add_adapter(two["fog"], "fog")
    assert module.adapter_names == ["default", "base"] and torch.equal(outputs(module), before)


def test_a_base_whose_heads_are_not_known_cannot_be_used(base, tmp_path):
    module = trained(use_lora=True, ckpt_path=base, load_ckpt_class_head=False)
    module.save_pretrained(tmp_path / "adapter")
    module = open_(tmp_path / "adapter")
    assert module.adapter_names == ["default"]
    with pytest.raises(ValueError, match="'base': its checkpoint left no trained heads"):
        module.use_adapter("base")


def test_what_is_no_adapter_cannot_be_added_or_used(base, two):
    with pytest.raises(ValueError, match="is not an adapter"):
        open_(two["night"]).add_adapter(base, "full")
    with pytest.raises(ValueError, match="this network has no adapters"):
        open_(base).add_adapter(two["night"], "night")
    with pytest.raises(ValueError, match=r"no adapter 'nigth': there are default, base"):
        open_(two["night"]).use_adapter("nigth")
