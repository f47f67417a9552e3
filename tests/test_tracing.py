"""What records the operations of a network, to export, compile or save them, gets plain ones of the deployed one."""

import io

import pytest
import torch
from conftest import TINY

from eomt.models.eomt import EoMT
from eomt.models.vit import ViT
from eomt.training.mask_classification_semantic import MaskClassificationSemantic

FAMILIES = ["vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3_qkvb"]
every_family = pytest.mark.parametrize("name", FAMILIES)
pytestmark = pytest.mark.filterwarnings("ignore")  # of the older exporters, which say that newer ones are there


def build(name=FAMILIES[0]):
    """As `from_pretrained` gives it: masked attention is on, with probabilities that tracing cannot read."""
    torch.manual_seed(0)
    encoder = ViT((32, 64), 16, name, False, {"embed_dim": 32, "depth": 2, "num_heads": 2})
    return EoMT(encoder, num_classes=3, num_q=6, num_blocks=1).eval().requires_grad_(False)


def images(batch=2):
    return torch.rand(batch, 3, 32, 64, generator=torch.Generator().manual_seed(batch))


def deployed(network, batch):
    with network.deployed():
        (masks,), (classes,) = network(batch)
    return masks, classes


def assert_same(found, network, batch):
    (masks,), (classes,) = found
    for ours, wanted in zip((masks, classes), deployed(network, batch), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5)


@every_family
def test_torch_export_takes_the_network_as_it_is_with_a_free_batch(name):
    network = build(name)
    program = torch.export.export(network, (images(),), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    for batch in (images(), images(1), images(3)):
        assert_same(program.module()(batch), network, batch)


@every_family
def test_a_saved_torchscript_is_the_network(name):
    network = build(name)
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(network, images(), strict=False), file)  # it returns lists
    file.seek(0)
    assert_same(torch.jit.load(file)(images(3)), network, images(3))


@pytest.mark.parametrize(("name", "dynamo"), [(FAMILIES[0], True), *[(name, False) for name in FAMILIES]])
def test_both_exporters_to_onnx_take_the_network_as_it_is(name, dynamo, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    network = build(name)
    if dynamo:
        pytest.importorskip("onnxscript")
        free = {"dynamic_shapes": ({0: torch.export.Dim.DYNAMIC},)}
    else:
        free = {"input_names": ["images"], "dynamic_axes": {"images": {0: "batch"}}}
    torch.onnx.export(network, (images(),), tmp_path / "network.onnx", dynamo=dynamo, **free)
    session = onnxruntime.InferenceSession(tmp_path / "network.onnx", providers=["CPUExecutionProvider"])
    for batch in (images(), images(1)):
        masks, classes = session.run(None, {session.get_inputs()[0].name: batch.numpy()})
        assert_same(([torch.from_numpy(masks)], [torch.from_numpy(classes)]), network, batch)


def test_the_whole_network_compiles_without_a_graph_break():
    network = build()
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    assert_same(compiled(images()), network, images())


def test_an_adapted_network_is_traced_and_exported_before_it_is_merged():
    module = MaskClassificationSemantic(**TINY, use_lora=True).eval()
    network, batch = module.network, torch.rand(2, 3, 64, 128)
    assert_same(torch.export.export(network, (batch,)).module()(batch), network, batch)
    assert_same(torch.jit.trace(network, batch, strict=False)(batch), network, batch)


def test_in_training_masks_are_left_as_they_are_and_so_are_the_predictions_without_tracing():
    network = build()
    assert len(network(images())[0]) == 2
    network.train()
    traced = torch.jit.trace(network, images(), strict=False, check_trace=False)
    assert len(traced(images())[0]) == 2
