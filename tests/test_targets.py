"""Which layers a LoRA target means in networks of others: roles, endings, full names, and several stacks."""

import logging

import pytest
import timm
import torch
from torch import nn

from eomt.targets import find_stacks, resolve
from lora_config import LoRASettings, apply_lora, find_targets

transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed: its networks are adapted here"
)
QKV = ("query", "key", "value")


def meta(kind, **sizes):
    """A network of transformers without weights."""
    with torch.device("meta"):
        return getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**sizes))


def mbart(encoder=2, decoder=3, width=16):
    sizes = dict(vocab_size=30, d_model=width, encoder_attention_heads=2, decoder_attention_heads=2)
    sizes |= dict(encoder_ffn_dim=width, decoder_ffn_dim=width, max_position_embeddings=16)
    return meta("MBart", encoder_layers=encoder, decoder_layers=decoder, **sizes)


class Named(nn.Module):
    """Modules by name; a dot in a name nests."""

    def __init__(self, **parts):
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


def attention(*names):
    return Named(attn=Named(**{name: nn.Linear(2, 2) for name in names}), mlp=Named(fc1=nn.Linear(2, 2)))


def short(names):
    return sorted({name.rpartition(".")[2] for name in names})


# Roles


@pytest.mark.parametrize(
    ("names", "query", "out"),
    [
        (("query", "key", "value", "dense"), "query", "dense"),
        (("q_proj", "k_proj", "v_proj", "o_proj"), "q_proj", "o_proj"),
        (("q_proj", "k_proj", "v_proj", "out_proj"), "q_proj", "out_proj"),
        (("q", "k", "v", "o"), "q", "o"),
        (("q_lin", "k_lin", "v_lin", "out_lin"), "q_lin", "out_lin"),
        (("to_q", "to_k", "to_v", "proj"), "to_q", "proj"),
        (("qkv", "proj"), "qkv", "proj"),
        (("Wqkv", "Wo"), "Wqkv", "Wo"),
        (("query_key_value", "dense"), "query_key_value", "dense"),
    ],
)
def test_roles_mean_what_the_network_calls_them(names, query, out):
    module = nn.ModuleList([attention(*names), attention(*names)])
    assert resolve(module, ["query"]).names == [f"{i}.attn.{query}" for i in (0, 1)]
    assert resolve(module, ["out"]).names == [f"{i}.attn.{out}" for i in (0, 1)]
    assert short(resolve(module, ["attention"]).names) == sorted(names)
    assert short(resolve(module, ["mlp"]).names) == ["fc1"]


@pytest.mark.parametrize(
    ("kind", "sizes", "layers"),
    [
        ("Dinov2", {"num_hidden_layers": 2}, {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ("ViTMAE", {"num_hidden_layers": 2}, {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ("Bert", {"num_hidden_layers": 2}, {"query", "key", "value", "dense"}),
        ("T5", {"num_layers": 2}, {"q", "k", "v", "o"}),
        ("GPT2", {"n_layer": 2}, {"c_attn", "c_proj"}),
    ],
)
def test_attention_and_mlp_are_found_in_networks_of_transformers(kind, sizes, layers):
    module = meta(kind, **sizes)
    attention_layers = resolve(module, ["attention"]).names
    assert {name.rpartition(".")[2] for name in attention_layers} == layers
    mlp = resolve(module, ["mlp"]).names
    assert len(mlp) == 4 and not set(mlp) & set(attention_layers)


def test_a_fused_layer_says_which_parts_adapt_with_the_one_that_was_asked_for(caplog):
    module = nn.ModuleList([attention("qkv", "proj"), attention("qkv", "proj")])
    with caplog.at_level(logging.WARNING):
        apply_lora(module, LoRASettings(rank=1, target_modules=["query", "value"]))
    assert "query, value: q, k and v are one fused qkv layer here, so key adapts as well" in caplog.text
    module = nn.ModuleList([attention("q", "kv", "proj"), attention("q", "kv", "proj")])
    with caplog.at_level(logging.WARNING):
        apply_lora(module, LoRASettings(rank=1, target_modules=["query", "value"]))
    assert "targets value: k and v are one fused kv layer here, so key adapts as well" in caplog.text


def test_a_role_can_be_asked_for_in_one_part_of_the_network():
    module = mbart()
    assert len(resolve(module, ["encoder.query"]).names) == 2
    own = resolve(module, ["decoder.query"]).names
    assert len(own) == 3 and all(".self_attn." in name for name in own)
    assert len(resolve(module, ["encoder_attn.query"]).names) == 3


# Numbers of the source documents


def trainable(module):
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def test_dinov2_base_has_442368_adapter_parameters_at_rank_8():
    module = meta("Dinov2")
    apply_lora(module, LoRASettings(rank=8, target_modules=QKV))
    assert trainable(module) == 442_368
    assert sum(p.numel() for p in module.parameters()) == 86_168_064


def test_an_mbart_encoder_has_1179648_adapter_parameters_at_rank_16_and_its_decoder_none():
    module = meta("MBart", encoder_layers=12, decoder_layers=12, d_model=1024, vocab_size=100)
    apply_lora(module, LoRASettings(rank=16, target_modules=QKV))
    assert trainable(module) == trainable(module.encoder) == 1_179_648


# Several stacks


@pytest.mark.parametrize("targets", [["q_proj"], ["query"]])
def test_an_encoder_is_adapted_beside_a_longer_decoder_and_what_is_left_out_is_said(targets, caplog):
    module = mbart(encoder=2, decoder=6)
    with caplog.at_level(logging.WARNING):
        apply_lora(module, LoRASettings(rank=1, target_modules=targets))
    assert trainable(module.encoder) > 0 and trainable(module.decoder) == 0
    assert "leaves out decoder.layers.0" in caplog.text and "10 more" in caplog.text


def test_every_stack_that_matches_is_adapted():
    both = nn.ModuleDict({"vision": meta("Dinov2", num_hidden_layers=4, hidden_size=24), "text": mbart().encoder})
    names = find_targets(both, LoRASettings(target_modules=["q_proj"]))
    assert [name.split(".")[0] for name in names] == ["vision"] * 4 + ["text"] * 2


@pytest.mark.parametrize("depth", [1, 2])
def test_a_numbered_mlp_beside_a_shallow_encoder_hides_nothing(depth):
    mlp = nn.ModuleList(Named(a=nn.Linear(2, 2), b=nn.Linear(2, 2)) for _ in range(5))
    module = Named(layers=nn.ModuleList(attention("q_proj") for _ in range(depth)), mlp=mlp)
    assert resolve(module, ["query"]).names == [f"layers.{i}.attn.q_proj" for i in range(depth)]


def test_the_last_blocks_of_several_stacks_are_refused_and_the_stacks_are_listed():
    both = nn.ModuleDict({"vision": meta("Dinov2", num_hidden_layers=4, hidden_size=24), "text": mbart().encoder})
    with pytest.raises(ValueError, match=r"2 stacks, vision.encoder.layer \(4 blocks\), text.layers \(2 blocks\)"):
        resolve(both, QKV, blocks=1)
    assert len(resolve(both, ["vision.query"], blocks=1).names) == 1
    assert resolve(mbart(), ["query"], blocks=1).names == ["encoder.layers.1.self_attn.q_proj"]


def test_a_part_that_tells_the_stacks_apart_is_the_example():
    def stack():
        return Named(encoder=Named(layers=nn.ModuleList(attention("q_proj") for _ in range(2))))

    module = Named(text_model=stack(), vision_model=stack())
    with pytest.raises(ValueError, match=r"for example 'text_model.query'"):
        resolve(module, ["query"], blocks=1)
    assert len(resolve(module, ["text_model.query"], blocks=1).names) == 1


def test_an_mlp_in_a_part_that_is_named_after_the_attention_is_an_mlp():
    def block():
        return Named(attn_grid=attention("qkv", "proj"), attn_block=attention("qkv", "proj"))

    module = nn.ModuleList([block(), block()])
    assert short(resolve(module, ["mlp"]).names) == ["fc1"] and len(resolve(module, ["mlp"]).names) == 4
    assert short(resolve(module, ["attention"]).names) == ["proj", "qkv"]


def test_networks_of_different_kinds_in_a_list_are_stacks_of_their_own():
    module = nn.ModuleList([meta("Dinov2", num_hidden_layers=3, hidden_size=24), mbart().encoder])
    assert [len(stack) for stack in find_stacks(module)] == [3, 2]


def test_the_sublayers_of_a_block_are_no_blocks():
    module = meta("T5", num_layers=3).encoder
    assert resolve(module, ["query"], blocks=1).names == ["block.2.layer.0.SelfAttention.q"]


def test_a_decoder_alone_is_adapted_only_where_the_target_names_it():
    module = Named(decoder=nn.ModuleList([attention("q_proj"), attention("q_proj")]))
    with pytest.raises(ValueError, match=r"only layers of decoders .* for example 'decoder.query'"):
        resolve(module, ["query"])
    assert len(resolve(module, ["decoder.query"]).names) == len(resolve(module.decoder, ["query"]).names) == 2


def test_torchs_own_attention_is_refused_with_the_reason():
    module = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 4, batch_first=True), 2, enable_nested_tensor=False)
    with pytest.raises(
        ValueError, match=r"'attention' matches no linear layer; there are linear1, linear2.*MultiheadA"
    ):
        resolve(module, ["attention"])
    assert len(resolve(module, ["mlp"]).names) == 4


# Full names


def test_a_full_name_means_that_layer_alone(tmp_path):
    from eomt.lora.files import load_adapter, save_adapter

    def network():
        torch.manual_seed(0)
        return Named(
            layers=nn.ModuleList(attention("q") for _ in range(4)),
            aux=Named(layers=nn.ModuleList(attention("q") for _ in range(2))),
        )

    module, wanted = network(), [f"layers.{i}.attn.q" for i in range(4)]
    handle = apply_lora(module, LoRASettings(rank=1, target_modules=wanted))
    assert find_targets(module, LoRASettings(target_modules=wanted)) == wanted
    assert trainable(module.aux) == 0 and trainable(module) == 4 * 4
    save_adapter(handle, tmp_path)
    for load in (load_adapter, lambda base, folder: _peft().PeftModel.from_pretrained(base, folder)):
        again = network()
        load(again, tmp_path)
        assert again.state_dict().keys() == module.state_dict().keys()


def _peft():
    import peft

    return peft


def test_layers_outside_of_the_blocks_are_named_when_they_are_left_out(caplog):
    module = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, embed_dim=32, depth=2, num_heads=2, global_pool="map", class_token=False
    )
    with caplog.at_level(logging.WARNING):
        apply_lora(module, LoRASettings(rank=1, target_modules=["proj"]))
    assert "leaves out attn_pool.proj" in caplog.text
    assert resolve(module, ["attn_pool.proj"]).names == ["attn_pool.proj"]


@pytest.mark.parametrize("parent", ["factoratt_crpe", "mixer"])
def test_the_output_projection_is_found_beside_query_key_and_value_whatever_their_part_is_called(parent):
    block = Named(**{parent: Named(qkv=nn.Linear(2, 6), proj=nn.Linear(2, 2)), "mlp": Named(fc1=nn.Linear(2, 2))})
    network = Named(layers=nn.ModuleList([block, block]))
    assert short(resolve(network, ["attention"]).names) == ["proj", "qkv"]
    assert short(resolve(network, ["out"]).names) == ["proj"]
    assert short(resolve(network, ["mlp"]).names) == ["fc1"]


def test_a_role_that_is_found_in_part_is_told(caplog):
    network = Named(layers=nn.ModuleList(attention("q_proj", "v_proj", "strange") for _ in range(2)))
    apply_lora(network, LoRASettings(rank=1, target_modules=["attention"]))
    assert "LoRA target attention finds no key and no out in layers.0 and layers.1" in caplog.text
    caplog.clear()
    for names in (("qkv", "proj"), ("qk", "v", "proj")):
        whole = Named(layers=nn.ModuleList(attention(*names) for _ in range(2)))
        apply_lora(whole, LoRASettings(rank=1, target_modules=["attention"]))
    more = Named(layers=nn.ModuleList(attention("q_proj", "v_proj", "strange") for _ in range(2)))
    apply_lora(more, LoRASettings(rank=1, target_modules=["attention", "strange"]))  # who names them knows
    assert "finds no" not in caplog.text
