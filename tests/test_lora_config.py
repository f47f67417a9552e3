"""LoRA settings, applying, reporting, saving, loading and merging, on tiny networks."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import lora_config
from eomt.fingerprints import fingerprint
from eomt.lora.files import load_adapter, save_adapter
from eomt.lora.merging import merge
from eomt.lora.methods import update_norms
from eomt.lora.report import trainable_report
from lora_config import LoRASettings, adapted_layers, apply_lora, assert_not_adapted, find_targets

torch.set_num_threads(1)
ROOT = Path(__file__).parent.parent


def tiny_vit(depth=3, **kwargs):
    torch.manual_seed(0)
    sizes = dict(img_size=32, patch_size=8, embed_dim=32, depth=depth, num_heads=2, num_classes=0)
    return timm.create_model("vit_tiny_patch16_224", **sizes | kwargs).eval()


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))


def image():
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def randomise_adapters(module):
    generator = torch.Generator().manual_seed(2)
    for layer in adapted_layers(module).values():
        for name, p in layer.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                p.data = torch.randn(p.shape, generator=generator) * 0.1


def trainable(module):
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


# Settings


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"rank": 0}, "LoRA rank 0"),
        ({"rank": 1.5}, "LoRA rank 1.5"),
        ({"rank": True}, "LoRA rank True"),
        ({"alpha": 0}, "LoRA alpha 0"),
        ({"alpha": float("nan")}, "LoRA alpha nan"),
        ({"dropout": 1.5}, "LoRA dropout 1.5"),
        ({"dropout": 1}, "LoRA dropout 1"),
        ({"target_modules": []}, "at least one layer"),
        ({"target_modules": [3]}, "at least one layer"),
        ({"blocks": 0}, "LoRA blocks 0"),
        ({"blocks": "some"}, "LoRA blocks 'some'"),
    ],
)
def test_impossible_settings_are_refused_in_a_sentence(values, sentence):
    with pytest.raises(ValueError, match=sentence):
        LoRASettings(**values)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"r": 8}, "set `rank`"),
        ({"lora_alpha": 8}, "set `alpha`"),
        ({"lora_dropout": 0.1}, "set `dropout`"),
        ({"layers_to_transform": [1]}, "set `blocks`"),
        ({"modules_to_save": ["head"]}, "not accepted"),
        ({"bias": "all"}, "lora_bias"),
        ({"kasa_config": {}}, "truncates the base weights"),
        ({"use_rs_lora": True}, "did you mean 'use_rslora'"),
        ({"megatron_config": {}}, "accepted are use_rslora"),
        ({"use_dora": "yes"}, "true or false"),
        ({"rank_pattern": {"qkv": 0}}, "ranks of at least 1"),
        ({"init_lora_weights": False}, "changes the output"),
        ({"init_lora_weights": "pissa"}, "changes the base weights"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the base weights"),
        ({"init_lora_weights": "olora"}, "changes the base weights"),
        ({"init_lora_weights": "corda"}, "changes the base weights"),
        ({"init_lora_weights": "loftq"}, "changes the base weights"),
        ({"init_lora_weights": "mica"}, "freezes B"),
        ({"init_lora_weights": "eva"}, "plain LoRA"),
        ({"init_lora_weights": "lora_ga"}, "plain LoRA"),
        ({"init_lora_weights": "gausian"}, "unknown"),
    ],
)
def test_options_that_mislead_are_refused_with_reason_and_remedy(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        LoRASettings(options=options)


def test_every_supported_option_is_a_field_of_peft():
    from peft import LoraConfig

    assert set(lora_config.SUPPORTED_OPTIONS) <= set(LoraConfig.__dataclass_fields__)


def test_orthogonal_factors_need_an_even_rank():
    with pytest.raises(ValueError, match="even rank, such as 4"):
        LoRASettings(rank=3, options={"init_lora_weights": "orthogonal"})


def test_a_bare_string_is_one_target():
    assert LoRASettings(target_modules="qkv").target_modules == ("qkv",)


# Finding layers


def test_patch_embedding_is_never_adapted():
    module = tiny_vit(depth=2)
    assert find_targets(module, LoRASettings(target_modules="proj")) == ["blocks.0.attn.proj", "blocks.1.attn.proj"]
    linear = nn.ModuleDict({"patch_embed": nn.ModuleDict({"proj": nn.Linear(8, 8)}), "vit": module})
    assert not any("patch" in name for name in find_targets(linear, LoRASettings(target_modules="proj")))


def test_attention_pooling_is_outside_the_blocks():
    module = tiny_vit(depth=2, global_pool="map", class_token=False)
    assert isinstance(module.attn_pool.proj, nn.Linear)
    assert all(name.startswith("blocks.") for name in find_targets(module, LoRASettings(target_modules="proj")))


def test_the_last_blocks_can_be_chosen():
    targets = find_targets(tiny_vit(), LoRASettings(target_modules=["qkv", "fc1"], blocks=2))
    assert targets == ["blocks.1.attn.qkv", "blocks.1.mlp.fc1", "blocks.2.attn.qkv", "blocks.2.mlp.fc1"]


def test_more_blocks_than_there_are_is_an_error_naming_both():
    with pytest.raises(ValueError, match="blocks 4: the module has 3 numbered blocks"):
        find_targets(tiny_vit(), LoRASettings(blocks=4))


def test_blocks_are_counted_through_stages():
    stages = [nn.Sequential(*[nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(n)]) for n in (1, 3)]
    module = nn.ModuleDict({"layers": nn.ModuleList(nn.ModuleDict({"blocks": stage}) for stage in stages)})
    assert find_targets(module, LoRASettings(target_modules="0", blocks=4)) == [
        "layers.0.blocks.0.0",
        "layers.1.blocks.0.0",
        "layers.1.blocks.1.0",
        "layers.1.blocks.2.0",
    ]


def test_a_nested_part_is_not_taken_for_the_blocks():
    module = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    assert find_targets(module, LoRASettings(target_modules="0")) == ["0", "2.0"]
    with pytest.raises(ValueError, match="blocks 1: the module has 0 numbered blocks"):
        find_targets(module, LoRASettings(target_modules="0", blocks=1))


def test_a_target_that_matches_nothing_is_an_error_listing_what_there_is():
    with pytest.raises(
        ValueError, match=r"'querry' matches no linear layer; there are attn.proj, attn.qkv, mlp.fc1, mlp"
    ):
        find_targets(tiny_vit(), LoRASettings(target_modules=["qkv", "querry"]))


def test_separate_q_and_v_names_adapt_the_fused_layer_with_a_warning(caplog):
    module = tiny_vit(depth=2)
    with caplog.at_level(logging.WARNING):
        apply_lora(module, LoRASettings(target_modules=["q_proj", "v_proj"]))
    assert list(adapted_layers(module)) == ["blocks.0.attn.qkv", "blocks.1.attn.qkv"]
    assert "q, k and v are one fused qkv layer" in caplog.text


def test_targets_are_the_same_before_and_after_adaptation():
    module, settings = tiny_vit(), LoRASettings(target_modules=["qkv", "fc2"], blocks=2)
    before = find_targets(module, settings)
    apply_lora(module, settings)
    assert find_targets(module, settings) == before == list(adapted_layers(module))


# Applying


@pytest.mark.parametrize(
    ("backbone", "rank", "targets", "count"),
    [
        ("vit_large_patch16_224", 16, ["qkv"], 1_572_864),
        ("vit_large_patch16_224", 16, ["attn.qkv", "attn.proj"], 2_359_296),
        ("vit_large_patch16_224", 16, ["qkv", "proj", "fc1", "fc2"], 6_291_456),
        ("vit_base_patch16_224", 8, ["qkv"], 294_912),
        ("vit_base_patch16_224", 8, ["qkv", "attn.proj"], 442_368),
    ],
)
def test_parameter_counts_are_those_of_the_formula(backbone, rank, targets, count):
    with torch.device("meta"):
        module = timm.create_model(backbone, num_classes=0)
    apply_lora(module, LoRASettings(rank=rank, target_modules=targets))
    assert trainable(module) == count


def test_names_stay_native_and_the_base_is_frozen():
    module = tiny_vit()
    keys = set(module.state_dict())
    apply_lora(module, LoRASettings())
    assert "blocks.0.attn.qkv.lora_A.default.weight" in module.state_dict()
    assert {key.replace(".base_layer.", ".") for key in module.state_dict() if ".lora_" not in key} == keys
    assert all((".lora_" in name) == p.requires_grad for name, p in module.named_parameters())


def test_adapters_leave_outputs_unchanged_at_initialisation():
    module = tiny_vit()
    before = module(image())
    apply_lora(module, LoRASettings(dropout=0.5))
    assert torch.equal(module(image()), before)  # dropout follows the module's eval mode


def test_adapters_of_a_bfloat16_base_are_float32():
    module = tiny_vit().bfloat16()
    apply_lora(module, LoRASettings())
    assert {p.dtype for p in module.parameters() if p.requires_grad} == {torch.float32}


def test_adapting_twice_is_refused():
    module = tiny_vit()
    apply_lora(module, LoRASettings())
    with pytest.raises(ValueError, match="already carries LoRA adapters"):
        apply_lora(module, LoRASettings())
    with pytest.raises(ValueError, match="load weights and adapt before"):
        assert_not_adapted(module)


def test_any_module_can_be_adapted_and_merged():
    module = mlp()
    x = torch.randn(3, 6)
    handle = apply_lora(module, LoRASettings(rank=2, target_modules=["0", "2"]))
    randomise_adapters(module)
    expected = module.eval()(x)
    assert torch.allclose(merge(handle)(x), expected, atol=1e-6)


class Codes(torch.Tensor):
    """Weights in a form of their own, whose bytes cannot be read."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.Tensor.view:
            raise NotImplementedError("unimplemented operator aten.view")
        return super().__torch_function__(func, types, args, kwargs or {})


def test_a_base_whose_bytes_cannot_be_read_is_said_and_left_as_it_was():
    module = mlp()
    module[0].weight = nn.Parameter(module[0].weight.detach().as_subclass(Codes))
    with pytest.raises(ValueError, match="weights of the type Codes have no bytes to know a base by"):
        apply_lora(module, LoRASettings(rank=2, target_modules=["2"]))
    assert not adapted_layers(module)


@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_weight_that_is_computed_anew_cannot_take_an_update_and_the_adapter_stays(norm):
    module = nn.Sequential(norm(nn.Linear(6, 6)), nn.Linear(6, 6))
    handle = apply_lora(module, LoRASettings(rank=2, target_modules=["0", "1"]))
    with pytest.raises(ValueError, match=r"0 computes its weight anew.*so the update would be lost"):
        merge(handle)
    assert len(adapted_layers(module)) == 2


@pytest.mark.parametrize("targets", [["head"], ["head", "0.q_proj"]])
def test_an_update_of_a_tied_weight_is_not_merged_for_it_would_change_what_it_is_tied_to(targets):
    module = nn.ModuleDict({"embed": nn.Embedding(6, 4), "head": nn.Linear(4, 6, bias=False)})
    module["layers"] = nn.ModuleList(nn.ModuleDict({"q_proj": nn.Linear(4, 4), "fc": nn.Linear(4, 4)}) for _ in "ab")
    module["head"].weight = module["embed"].weight
    handle = apply_lora(module, LoRASettings(rank=2, target_modules=targets))
    with pytest.raises(ValueError, match=r"the weight of head is that of embed, too.*untie"):
        merge(handle)


def test_a_pattern_that_matches_no_adapted_layer_is_refused():
    with pytest.raises(ValueError, match="rank_pattern 'fc1' matches none"):
        apply_lora(tiny_vit(), LoRASettings(options={"rank_pattern": {"fc1": 4}}))


def test_update_norms_are_those_of_the_full_product():
    module = tiny_vit()
    apply_lora(module, LoRASettings(rank=4, options={"rank_pattern": {"qkv": 2}, "use_rslora": True}))
    assert set(update_norms(module).values()) == {0.0}
    randomise_adapters(module)
    for name, layer in adapted_layers(module).items():
        assert update_norms(module)[name] == pytest.approx(layer.get_delta_weight("default").norm().item(), rel=1e-5)


# Reporting


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fingerprint_ignores_adapters_and_sees_every_base_change(dtype):
    module = tiny_vit(depth=2).to(dtype)
    module.register_buffer("step", torch.tensor(3))
    module.register_buffer("empty", torch.zeros(0))
    before = fingerprint(module)
    apply_lora(module, LoRASettings())
    randomise_adapters(module)
    assert fingerprint(module) == before
    module.blocks[1].attn.qkv.base_layer.weight.data[0, 0] += 1
    changed = fingerprint(module)
    assert changed != before
    module.step += 1
    assert fingerprint(module) != changed


def test_report_groups_tensors_over_blocks():
    network = nn.ModuleDict({"backbone": tiny_vit(), "heads": nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])})
    apply_lora(network["backbone"], LoRASettings(rank=4))
    lines = trainable_report(network).splitlines()
    assert lines[0] == "TRAINABLE PARAMETERS (LoRA)"
    assert lines[1].split() == ["backbone.blocks.{0..2}.attn.qkv.lora_A", "3", "x", "[4,", "32]", "384"]
    assert any(line.split() == ["heads.{0,1}.weight", "2", "x", "[4,", "4]", "32"] for line in lines)
    total = sum(p.numel() for p in network.parameters())
    assert lines[-3:] == [
        f"Total trainable: {trainable(network):,}",
        f"Total frozen: {total - trainable(network):,}",
        f"SUMMARY: {100 * trainable(network) / total:.2f}% trainable",
    ]
    assert trainable_report(mlp(), "TRAINABLE PARAMETERS").startswith("TRAINABLE PARAMETERS\n")


# Saving, loading, merging


@pytest.fixture
def saved(tmp_path):
    module = tiny_vit()
    handle = apply_lora(module, LoRASettings(rank=4))
    randomise_adapters(module)
    save_adapter(handle, tmp_path / "adapter")
    return module, tmp_path / "adapter"


def test_an_adapter_comes_back_bit_for_bit(saved):
    module, directory = saved
    fresh = tiny_vit()
    load_adapter(fresh, directory)
    assert all(
        torch.equal(a, b) for a, b in zip(module.state_dict().values(), fresh.state_dict().values(), strict=True)
    )
    assert torch.equal(fresh(image()), module(image()))
    assert trainable(fresh) == 0


def test_a_loaded_adapter_can_train_on(saved):
    module, directory = saved
    fresh = tiny_vit()
    load_adapter(fresh, directory, is_trainable=True)
    assert trainable(fresh) == trainable(module)
    assert torch.equal(fresh(image()), module(image()))  # dropout follows the module's eval mode


def test_only_the_two_files_of_peft_are_written_and_peft_loads_them(saved):
    from peft import PeftModel

    module, directory = saved
    assert sorted(path.name for path in directory.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    config = json.loads((directory / "adapter_config.json").read_text())
    assert config["r"] == 4 and config["target_modules"] == sorted(adapted_layers(module))
    assert torch.equal(PeftModel.from_pretrained(tiny_vit(), str(directory))(image()), module(image()))


def test_an_adapter_with_many_layers_comes_back(tmp_path):
    module = tiny_vit(depth=12)  # PEFT shortens lists of 20 targets and more
    handle = apply_lora(module, LoRASettings(rank=2, target_modules=["qkv", "proj", "fc1"], blocks=9))
    randomise_adapters(module)
    save_adapter(handle, tmp_path)
    fresh = tiny_vit(depth=12)
    load_adapter(fresh, tmp_path)
    assert list(adapted_layers(fresh)) == list(adapted_layers(module)) and len(adapted_layers(fresh)) == 27
    assert torch.equal(fresh(image()), module(image()))


def test_an_adapter_on_other_base_weights_is_refused(saved):
    other = tiny_vit()
    other.norm.weight.data += 1
    with pytest.raises(ValueError, match="trained on other base weights"):
        load_adapter(other, saved[1])
    assert not adapted_layers(other)


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
@pytest.mark.parametrize("fault", ["missing", "unexpected"])
def test_every_saved_tensor_must_land(saved, fault):
    from safetensors.torch import load_file, save_file

    path = saved[1] / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(iter(tensors))
    tensor = tensors.pop(name)
    if fault == "unexpected":
        tensors |= {name: tensor, name.replace("blocks", "bricks"): tensor.clone()}
    save_file(tensors, path)
    module = tiny_vit()
    with pytest.raises(ValueError, match=f"does not fit.*{fault}: base_model.*lora_A"):
        load_adapter(module, saved[1])
    assert not adapted_layers(module)


def test_a_folder_without_adapter_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json is missing"):
        load_adapter(tiny_vit(), tmp_path)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True, "rank_pattern": {"qkv": 2}}])
def test_merging_changes_no_output_and_restores_the_keys(options):
    module = tiny_vit()
    keys = list(module.state_dict())
    handle = apply_lora(module, LoRASettings(rank=4, options=options))
    randomise_adapters(module)
    before = module(image())
    merged = merge(handle)
    assert merged is module and list(module.state_dict()) == keys
    assert torch.allclose(module(image()), before, atol=1e-5)
    apply_lora(module, LoRASettings())  # plain again


def test_a_small_update_survives_merging_into_bfloat16_weights():
    module = tiny_vit(depth=2).bfloat16()
    handle = apply_lora(module, LoRASettings(rank=4, target_modules="qkv"))
    randomise_adapters(module)
    layer = adapted_layers(module)["blocks.0.attn.qkv"]
    layer.lora_B["default"].weight.data *= 1e-3
    base, delta = layer.base_layer.weight.float(), layer.get_delta_weight("default")
    merged = merge(handle).blocks[0].attn.qkv.weight
    assert torch.allclose(merged - base, delta, atol=1e-7)


# Imports


def test_missing_peft_names_the_command_and_plain_import_does_not_need_it():
    code = (
        "import sys; sys.modules['peft'] = None\n"
        "import torch, lora_config\n"
        "from eomt.lora.report import trainable_report\n"
        "module = torch.nn.Sequential(torch.nn.Linear(2, 2))\n"
        "print(trainable_report(module, 'T'), lora_config.adapted_layers(module))\n"
        "try: lora_config.apply_lora(module, lora_config.LoRASettings(target_modules='0'))\n"
        "except ImportError as error: print(error)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "pip install peft" in result.stdout, result.stderr


def test_it_stands_alone():
    others = {"peft", "timm", "lightning", "hydra", "omegaconf", "eomt", "transformers"}
    code = f"import sys, lora_config; print([m for m in sys.modules if m.split('.')[0] in {others}])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr
