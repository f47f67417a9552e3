"""A frozen base in 8 or 4 bits: what is trained is what is scored, saved, opened and merged."""

import copy
import importlib.util
import json

import pytest
import torch
from conftest import TINY, fit
from torch import nn

from eomt.cost.training_cost import training_cost, variants
from eomt.data.toy_streets import toy_streets
from eomt.diagnosis.doctor import diagnose
from eomt.diagnosis.inspection import inspect_model
from eomt.fingerprints import identify
from eomt.inference.artefacts import merge_adapter
from eomt.lora.report import trainable_report
from eomt.settings.run import check_model
from eomt.settings.trainer import check_callbacks
from eomt.training.callbacks import AuditLoRA
from eomt.training.mask_classification_semantic import MaskClassificationSemantic
from eomt.training.weight_average import EMA

pytest.importorskip("bitsandbytes", reason="needs eomt-lora[quantised]")

from eomt.lora.quantised import QuantisedLinear, count_parameters

KINDS = ("8bit", "4bit")
ERROR = {"8bit": 0.01, "4bit": 0.1}  # of a weight matrix, relative


def build(**settings):
    torch.manual_seed(0)
    return MaskClassificationSemantic(**{**TINY, "warmup_steps": [0, 0], **settings})


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "base"
    build().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def data(toy_cache):
    return toy_streets(
        str(toy_cache), num_train=8, num_val=3, size=(64, 128), img_size=[64, 128], batch_size=2, num_workers=0
    )


def trained(base, data, kind, *callbacks, **settings):
    module = build(use_lora=True, ckpt_path=base, base_quantisation=kind, **settings)
    module.log = module.log_dict = lambda *args, **options: None
    audit = AuditLoRA()
    fit(module, data, audit, *callbacks, max_steps=4)
    return module, audit.audit


def outputs(module):
    image = torch.randint(0, 256, (1, 3, 64, 128), generator=torch.Generator().manual_seed(1)) / 255
    with torch.no_grad(), module.eval().network.deployed():
        mask_logits, class_logits = module.network(image)
    return torch.cat([t.flatten() for t in (*mask_logits, *class_logits)])


def quantised(module):
    return {name: part for name, part in module.named_modules() if isinstance(part, QuantisedLinear)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_quantised_layer_is_the_plain_one_with_the_decoded_weights_forward_and_backward(kind, dtype):
    torch.manual_seed(0)
    source = nn.Linear(33, 65).requires_grad_(False)
    layer = QuantisedLinear(source, kind)
    plain, x = layer.plain(), torch.randn(2, 5, 33)
    assert (plain.weight - source.weight).norm() < ERROR[kind] * source.weight.norm()
    results = []
    for part in (layer, plain):
        own = x.clone().requires_grad_()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            y = part(own)
        y.float().square().sum().backward()
        results.append((y.float(), own.grad))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_on_a_quantised_base_passes_its_audit_and_saves_what_was_trained(base, data, tmp_path, kind):
    module, audit = trained(base, data, kind)
    assert audit.complete and all(check["passed"] for check in audit.results.values())
    layers = quantised(module.backbone)
    assert len(layers) == 3 * 4 and all(".lora_" not in name for name in layers)  # qkv, proj, fc1, fc2 of 3 blocks
    assert all(p.dtype == torch.float32 for p in module.parameters() if p.requires_grad)
    module.save_pretrained(tmp_path / "adapter")
    assert module.base.exact == identify(build(ckpt_path=base).backbone).exact  # of the weights before rounding
    opened = MaskClassificationSemantic.from_pretrained(tmp_path / "adapter")
    assert torch.equal(outputs(opened), outputs(module)) and quantised(opened.backbone).keys() == layers.keys()
    assert opened.hparams.base_quantisation == kind and not any(p.requires_grad for p in opened.backbone.parameters())
    assert inspect_model(tmp_path / "adapter")["fit"]["fits"]
    findings = diagnose(tmp_path / "adapter", tmp_path)
    assert not [name for name, finding in findings.items() if finding.passed is False]


@pytest.mark.parametrize(("kind", "method"), [("8bit", "lora"), ("4bit", "lora"), ("4bit", "ia3")])
def test_merging_decodes_the_base_so_that_the_whole_network_is_the_one_that_was_trained(
    base, data, tmp_path, kind, method
):
    module, _ = trained(base, data, kind, lora_method=method)
    before = outputs(module)
    merge_adapter(module)
    assert not quantised(module) and module.hparams.base_quantisation is None
    module.save_pretrained(tmp_path / "merged")
    opened = MaskClassificationSemantic.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(outputs(opened), before, rtol=1e-4, atol=1e-4)


def test_a_checkpoint_of_a_run_on_a_quantised_base_holds_no_code_of_it_and_opens(base, data, tmp_path):
    module, _ = trained(base, data, "4bit")
    trainer = module.trainer
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert all(tensor.dtype == torch.float32 for tensor in state.values()) and not [
        k for k in state if "base_layer" in k
    ]
    opened = MaskClassificationSemantic.from_pretrained(tmp_path / "last.ckpt")
    assert torch.equal(outputs(opened), outputs(module))


def test_a_run_on_a_quantised_base_goes_on_from_its_checkpoint_bit_for_bit(base, data, tmp_path):
    module, _ = trained(base, data, "8bit")
    module.trainer.save_checkpoint(tmp_path / "last.ckpt")
    again = build(use_lora=True, ckpt_path=base, base_quantisation="8bit")
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    again.on_load_checkpoint(checkpoint)
    again.load_state_dict(checkpoint["state_dict"], strict=True)
    assert torch.equal(outputs(again), outputs(module))
    with pytest.raises(ValueError, match="base_quantisation"):
        build(use_lora=True, ckpt_path=base, base_quantisation="4bit").on_load_checkpoint(checkpoint)


def test_an_average_of_the_weights_leaves_codes_as_they_are(base, data):
    codes = {
        n: p.weight.clone()
        for n, p in quantised(build(use_lora=True, ckpt_path=base, base_quantisation="4bit")).items()
    }
    module, _ = trained(base, data, "4bit", EMA(0.9))
    assert all(torch.equal(layer.weight, codes[name]) for name, layer in quantised(module).items())
    node = {"_target_": "lightning.pytorch.callbacks.WeightAveraging"}
    with pytest.raises(ValueError, match="codes of the base"):
        check_callbacks({"average": node}, {"use_lora": True, "base_quantisation": "4bit"})


def test_adapters_of_one_network_share_its_rounding(base, data, tmp_path):
    for kind in (None, "4bit"):
        build(use_lora=True, ckpt_path=base, base_quantisation=kind).save_pretrained(tmp_path / str(kind))
    module = MaskClassificationSemantic.from_pretrained(tmp_path / "4bit")
    module.add_adapter(tmp_path / "4bit", "night")
    with pytest.raises(ValueError, match="agree in base_quantisation"):
        module.add_adapter(tmp_path / "None", "plain")


def test_parameters_are_counted_as_before_rounding(base):
    plain, packed = (build(use_lora=True, ckpt_path=base, base_quantisation=kind) for kind in (None, "4bit"))
    assert count_parameters(packed) == count_parameters(plain) == sum(p.numel() for p in plain.parameters())
    assert trainable_report(packed) == trainable_report(plain)


def test_the_estimate_of_a_quantised_base_is_what_its_tensors_take():
    settings = {**TINY, "use_lora": True, "pretrained": True, "lora_dropout": 0.0}
    bytes_of = {}
    for kind in (None, *KINDS):
        cost = training_cost({**settings, "base_quantisation": kind}, 1, precision="32-true", device="cpu")
        bytes_of[kind] = cost.weights
        assert sum(cost.parameters.values()) == sum(cost.parameters.values())
    linear = 3 * 12 * 64 * 64
    assert bytes_of[None] - bytes_of["8bit"] == pytest.approx(linear * (4 - 1 - 4 / 64), rel=0.1)
    assert bytes_of[None] - bytes_of["4bit"] == pytest.approx(linear * (4 - 0.5 - 4 / 64), rel=0.1)
    ways, given = variants({**build().hparams, "use_lora": True, "pretrained": True, "base_quantisation": "4bit"})
    assert given == "LoRA" and [bool(way["base_quantisation"]) for way in ways.values()] == [False, True, True, False]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "without use_lora"),
        ({"use_lora": True}, "random base"),
        ({"use_lora": True, "pretrained": True, "lora_options": {"use_dora": True}}, "use_dora"),
        ({"use_lora": True, "pretrained": True, "base_dtype": "bfloat16"}, "base_dtype bfloat16"),
        ({"use_lora": True, "pretrained": True, "compile": True}, "compile"),
        ({"use_lora": True, "pretrained": True, "lora_method": "mine.LoHa"}, "lora_method mine.LoHa"),
    ],
)
def test_a_quantised_base_is_refused_where_it_cannot_be_right(settings, words):
    with pytest.raises(ValueError, match=f"base_quantisation 4bit .*{words}"):
        check_model({**TINY, "base_quantisation": "4bit", **settings})


def test_a_missing_library_is_told_before_torch_is_asked(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "bitsandbytes" else real(name, *a)
    )
    with pytest.raises(ImportError, match=r"base_quantisation=8bit .*eomt-lora\[quantised\]"):
        check_model({**TINY, "use_lora": True, "pretrained": True, "base_quantisation": "8bit"})


def test_a_copy_of_a_quantised_network_is_the_same(base):
    module = build(use_lora=True, ckpt_path=base, base_quantisation="4bit")
    assert torch.equal(outputs(copy.deepcopy(module)), outputs(module))
    assert json.loads(json.dumps(dict(module.hparams)))["base_quantisation"] == "4bit"
