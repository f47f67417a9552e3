"""An adapter out of a full fine-tune: the best of its rank, with all that it leaves out named and measured."""

import json

import pytest
import torch
from conftest import TINY
from hypothesis import given, settings
from hypothesis import strategies as st

from eomt.data.cityscapes import CITYSCAPES
from eomt.diagnosis.extraction import extract, print_facts
from eomt.diagnosis.inspection import inspect_model
from eomt.exchange.publishing import stage
from eomt.inference.artefacts import merge_adapter
from eomt.lora.extraction import Change
from eomt.training.mask_classification_semantic import MaskClassificationSemantic

CHANGED = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


def build(**changes):
    torch.manual_seed(0)
    return MaskClassificationSemantic(**{**TINY, "class_names": list(CITYSCAPES.names), **changes})


def outputs(module):
    image = torch.rand(1, 3, 64, 128, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), module.eval().network.deployed():
        return torch.cat([part.flatten() for parts in module.network(image) for part in parts])


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """A base, a network that differs from it by updates of rank 3 and by its heads, and one that differs everywhere."""
    folder = tmp_path_factory.mktemp("networks")
    module = build()
    module.save_pretrained(folder / "base")
    torch.manual_seed(1)
    with torch.no_grad():
        for name, part in module.backbone.named_modules():
            if name.endswith(CHANGED):
                out, inputs = part.weight.shape
                part.weight += 0.005 * torch.randn(out, 3) @ torch.randn(3, inputs)
        module.network.q.weight += 0.1
        module.network.class_head.weight *= 1.5
    module.save_pretrained(folder / "low_rank")
    with torch.no_grad():
        for name, p in module.backbone.named_parameters():
            if name.endswith(("norm1.weight", "qkv.bias")):
                p += 0.05 * torch.randn_like(p)
            elif name.endswith(tuple(f"{target}.weight" for target in CHANGED)):
                p += 0.002 * torch.randn_like(p)
    module.save_pretrained(folder / "full")
    return folder


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 12), st.integers(0, 99))
def test_factors_give_the_nearest_matrix_of_their_rank_and_the_share_that_it_keeps(out, inputs, rank, seed):
    before, change = torch.randn(2, out, inputs, generator=torch.Generator().manual_seed(seed), dtype=torch.double)
    found = Change.between(before, before + change)
    a, b = found.factors(rank)
    assert a.shape == (rank, inputs) and b.shape == (out, rank)
    torch.testing.assert_close(b @ a, found.update(rank))
    lost = (change - b @ a).square().sum() / change.square().sum()
    assert abs(1 - lost.item() - found.kept(rank)) < 1e-9  # Eckart and Young
    assert found.kept(found.rank_for(0.9)) >= 0.9 - 1e-9
    assert found.rank_for(0.9) == 1 or found.kept(found.rank_for(0.9) - 1) < 0.9


def test_a_layer_that_did_not_change_is_kept_whole_by_every_rank():
    weights = torch.randn(3, 4)
    found = Change.between(weights, weights)
    assert found.kept(1) == 1 and found.rank_for(0.9) == 0 and not any(factor.any() for factor in found.factors(2))


def test_a_change_of_low_rank_is_extracted_as_it_is(networks, tmp_path):
    facts = extract(
        networks / "low_rank", str(networks / "base"), tmp_path / "out", rank=3, ranks=(1, 2, 3), scores=False
    )
    assert facts["kept"]["3"] == pytest.approx(1) and facts["kept"]["1"] < facts["kept"]["2"] < 0.99
    assert facts["left_out"] == {} and facts["left_out_share"] == 0 and facts["miou"] == {}
    opened, whole = (
        MaskClassificationSemantic.from_pretrained(path) for path in (tmp_path / "out", networks / "low_rank")
    )
    torch.testing.assert_close(outputs(opened), outputs(whole), rtol=1e-4, atol=1e-4)
    assert torch.equal(opened.network.q.weight, whole.network.q.weight)
    assert (opened.hparams.lora_rank, opened.hparams.use_lora) == (3, True)
    merge_adapter(opened)
    torch.testing.assert_close(outputs(opened), outputs(whole), rtol=1e-4, atol=1e-4)


def test_an_extracted_adapter_passes_inspection_and_meets_its_base_or_is_refused(networks, tmp_path):
    extract(networks / "full", str(networks / "base"), tmp_path / "out", rank=2, ranks=(2,), scores=False)
    facts = inspect_model(tmp_path / "out")
    assert facts["fit"]["fits"] and len(facts["updates"]) == 3 * 4
    assert all(update["norm"] > 0 and update["rank"] == 2 for update in facts["updates"].values())
    with pytest.raises(ValueError, match="base weights"):
        MaskClassificationSemantic.from_pretrained(tmp_path / "out", str(networks / "full"))


def test_what_no_rank_holds_is_named_and_measured(networks, tmp_path):
    out = tmp_path / "out"
    facts = extract(
        networks / "full", str(networks / "base"), out, rank=2, targets=CHANGED[:2], ranks=(2, 64), scores=False
    )
    assert set(facts["left_out"]) == {
        "blocks.#.norm1.weight", "blocks.#.attn.qkv.bias", "blocks.#.mlp.fc1.weight", "blocks.#.mlp.fc2.weight",
    }  # fmt: skip
    assert all(kind["tensors"] == 3 and kind["norm"] > 0 for kind in facts["left_out"].values())
    assert 0.1 < facts["left_out_share"] < 0.9 and facts["kept"]["64"] == pytest.approx(1)
    assert set(facts["layers"]) == {f"blocks.{k}.{name}" for k in range(3) for name in CHANGED[:2]}
    assert json.loads((out / "extraction.json").read_text())["left_out"] == facts["left_out"]
    assert (out / "extraction.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_left_out_is_told_in_plain_numbers(capsys):
    left_out = {"a.bias": {"tensors": 1, "relative": 1.04}, "b.bias": {"tensors": 8, "relative": 0.0063}}
    left_out |= {"c.bias": {"tensors": 2, "relative": 123.4}}
    print_facts({"miou": None, "kept": {"1": 0.5}, "left_out": left_out, "left_out_share": 0.05})
    said = capsys.readouterr().out
    assert "a.bias: 1 tensor, changed by up to 104 %" in said
    assert "b.bias: 8 tensors, changed by up to 0.63 %" in said and "up to 12,340 %" in said


def test_ranks_are_told_of_once_and_in_order(networks, tmp_path):
    options = {"rank": 2, "ranks": (4, 1, 4, 2), "scores": False}
    facts = extract(networks / "full", str(networks / "base"), tmp_path / "out", **options)
    assert list(facts["kept"]) == ["1", "2", "4"]


def test_the_card_of_an_extracted_adapter_says_that_it_was_not_trained(networks, tmp_path):
    extract(networks / "full", str(networks / "base"), tmp_path / "out", rank=1, ranks=(1,), scores=False)
    (tmp_path / "draft").mkdir()
    stage(tmp_path / "out", tmp_path / "draft", "user/name")
    text = (tmp_path / "draft" / "README.md").read_text()
    assert "not trained, but extracted from a full fine-tune" in text and "trained with" not in text


def test_every_rank_is_scored_on_the_data_and_low_rank_changes_score_as_the_whole(networks, toy_cache, tmp_path):
    data = ["data=toy_streets", f"data.root={toy_cache}", "data.num_train=8", "data.num_val=3", "data.size=[64,128]"]
    data += ["data.num_workers=0"]
    facts = extract(networks / "low_rank", str(networks / "base"), tmp_path / "out", 3, ranks=(1, 3), overrides=data)
    assert list(facts["miou"]) == ["0", "1", "3", "targets", "full"]
    assert facts["miou"]["3"] == pytest.approx(facts["miou"]["full"], abs=1e-3)
    assert facts["miou"]["targets"] == pytest.approx(facts["miou"]["full"], abs=1e-3)


def test_a_base_that_the_network_was_not_trained_from_is_warned_of(networks, tmp_path, caplog):
    torch.manual_seed(5)
    MaskClassificationSemantic(**TINY).save_pretrained(tmp_path / "other")
    extract(networks / "full", str(tmp_path / "other"), tmp_path / "out", rank=1, ranks=(1,), scores=False)
    assert "look whether the network was trained from" in caplog.text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{full}", "{none}", "{out}"], "no such file or folder; timm means"),
        (["{full}", "{base}", "{full}"], "is not empty"),
        (["{full}", "{base}", "{out}", "--rank", "0"], "rank 0: at least 1"),
        (["{full}", "{base}", "{out}", "--no-scores", "--rank", "999"], "no layer's change has more than rank 64 here"),
        (["{base}", "{base}", "{out}", "--no-scores"], "in all 12 layers: no change to extract"),
        (["{full}", "{base}", "{out}"], "config.yaml"),
        (["{full}", "{base}", "{out}", "--no-scores", "--targets", "nothing"], "matches no linear layer"),
    ],
)
def test_what_cannot_be_extracted_is_one_sentence(networks, tmp_path, call_script, words, message):
    places = {"full": networks / "full", "base": networks / "base", "out": tmp_path / "out", "none": tmp_path / "none"}
    code, error = call_script("extract_lora.py", *(word.format(**places) for word in words))
    assert code == 1 and message in error and "Traceback" not in error and not (tmp_path / "out").exists()


def test_an_adapter_is_no_full_fine_tune(networks, tmp_path, call_script):
    build(use_lora=True, ckpt_path=str(networks / "base")).save_pretrained(tmp_path / "adapter")
    code, error = call_script("extract_lora.py", tmp_path / "adapter", networks / "base", tmp_path / "out")
    assert code == 1 and "is an adapter already" in error
