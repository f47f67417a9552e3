"""Readers of saved networks answer any damage with the project's own errors, or predict what was saved."""

import copy
import io
import json
import shutil
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from eomt.command_line import EXPECTED_ERRORS
from eomt.diagnosis.inspection import inspect_model
from eomt.models.checkpoint import load_checkpoint, read_checkpoint
from eomt.training.mask_classification_semantic import MaskClassificationSemantic

SMALL = {
    "img_size": [32, 32],
    "num_classes": 3,
    "backbone_name": "vit_tiny_patch16_224",
    "backbone_kwargs": {"embed_dim": 16, "depth": 1, "num_heads": 2},
    "pretrained": False,
    "num_q": 3,
    "num_blocks": 1,
}
FORMS = {
    "adapter": ("adapter_config.json", "eomt_config.json", "adapter_model.safetensors", "heads.safetensors"),
    "model": ("eomt_config.json", "model.safetensors"),
}
# what stands in JSON anywhere; numbers are small, so that a network of any such size is soon built
VALUES = st.none() | st.booleans() | st.integers(-3, 70) | st.sampled_from([0.5, -1.0, float("nan"), float("inf")])
VALUES |= st.sampled_from(["", "lora", "LORA", "IA3", "all", "mine.Class", "vit_small_patch16_224", "../x", "bfloat16"])
VALUES |= st.lists(st.integers(-3, 70), max_size=3) | st.dictionaries(
    st.sampled_from(["a", "depth"]), st.integers(-1, 3)
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model, an adapter and a checkpoint of each."""
    folder = tmp_path_factory.mktemp("fuzz")
    for name, use_lora in (("model", False), ("adapter", True)):
        torch.manual_seed(0)
        module = MaskClassificationSemantic(**SMALL, use_lora=use_lora, lora_rank=2)
        module.save_pretrained(folder / name)
        checkpoint = {"state_dict": module.state_dict(), "hyper_parameters": dict(module.hparams)}
        torch.save(checkpoint, folder / f"{name}.ckpt")
    return folder


def outputs(module):
    with torch.no_grad(), module.network.deployed():
        masks, classes = module.network(torch.full((1, 3, 32, 32), 0.5))
    return torch.cat([t.flatten() for t in (*masks, *classes)])


def damaged(data, content: bytes) -> bytes:
    """Cut off, or with a few bytes changed."""
    if data.draw(st.booleans()):
        return content[: data.draw(st.integers(0, len(content) - 1))]
    content = bytearray(content)
    header = min(len(content), 3000)  # most of what a parser reads
    for place in data.draw(
        st.lists(st.integers(0, header - 1) | st.integers(0, len(content) - 1), min_size=1, max_size=4)
    ):
        content[place] = data.draw(st.integers(0, 255))
    return bytes(content)


def places(node, path=()):
    """Every place in nested JSON, as the keys that lead there."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


def edited(data, content: bytes) -> bytes:
    """JSON with an entry changed, left out or added."""
    tree = json.loads(content)
    *way, last = data.draw(st.sampled_from(sorted(places(tree), key=str)))
    node = tree
    for key in way:
        node = node[key]
    edit = data.draw(st.sampled_from(["change", "remove", "add"]))
    if edit == "remove":
        del node[last]
    else:
        key = (
            last if edit == "change" or isinstance(node, list) else data.draw(st.sampled_from(["schema", "more", "r"]))
        )
        node[key] = data.draw(VALUES)
    return json.dumps(tree).encode()


def tried(use, wanted=None):
    """Uses what was damaged: an expected error, or the outputs of what was saved."""
    try:
        found = use()
    except EXPECTED_ERRORS as error:
        assert str(error)
        return
    if wanted is not None:
        assert torch.equal(outputs(found), wanted), "it opened, and is another network"


def check_folder(saved, tmp_path, data):
    form = data.draw(st.sampled_from(sorted(FORMS)))
    name = data.draw(st.sampled_from(FORMS[form]))
    folder = tmp_path / form
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(saved / form, folder)
    content = (folder / name).read_bytes()
    change = data.draw(st.sampled_from([damaged, edited] if name.endswith("json") else [damaged]))
    (folder / name).write_bytes(change(data, content))
    wanted = outputs(MaskClassificationSemantic.from_pretrained(saved / form))
    tried(partial(MaskClassificationSemantic.from_pretrained, folder), wanted)
    tried(partial(inspect_model, folder))


def tensors_edited(data, content: dict) -> dict:
    """A checkpoint with a tensor of another shape or type, or with an entry of another kind."""
    content = copy.deepcopy(content)
    part = data.draw(st.sampled_from(["state_dict", "hyper_parameters", "top"]))
    if part == "top":
        content[data.draw(st.sampled_from(["state_dict", "hyper_parameters", "num_heads"]))] = data.draw(VALUES)
        return content
    key = data.draw(st.sampled_from(sorted(content[part])))
    if part == "hyper_parameters":
        content[part][key] = data.draw(VALUES)
        return content
    edits = [lambda t: t.flatten(), lambda t: t[None], lambda t: t.int(), lambda t: t * torch.nan, lambda t: None]
    edits += [lambda t: t[..., :0], lambda t: t.to(torch.complex64), lambda t: torch.zeros(())]
    content[part][key] = data.draw(st.sampled_from(edits))(content[part][key])
    return content


def check_checkpoint(saved, tmp_path, data):
    name = data.draw(st.sampled_from(["model", "adapter"]))
    content = torch.load(saved / f"{name}.ckpt", weights_only=True)
    buffer = io.BytesIO()
    torch.save(tensors_edited(data, content) if data.draw(st.booleans()) else content, buffer)
    raw = buffer.getvalue()
    path = tmp_path / "odd.ckpt"
    path.write_bytes(damaged(data, raw) if data.draw(st.integers(0, 3)) == 0 else raw)
    tried(partial(MaskClassificationSemantic.from_pretrained, path))
    tried(partial(inspect_model, path))
    tried(partial(read_checkpoint, path))
    tried(lambda: load_checkpoint(MaskClassificationSemantic(**SMALL).network, path))


QUICK = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
LONG = settings(max_examples=2000, deadline=None, suppress_health_check=list(HealthCheck))
CHECKS = pytest.mark.parametrize("check", [check_folder, check_checkpoint])


@CHECKS
@QUICK
@given(data=st.data())
def test_a_damaged_saved_network_is_refused_or_is_what_it_was(saved, tmp_path_factory, check, data):
    check(saved, tmp_path_factory.getbasetemp(), data)


@pytest.mark.soak
@pytest.mark.timeout(1200)
@CHECKS
@LONG
@given(data=st.data())
def test_thousands_of_damaged_saved_networks_are_refused_or_are_what_they_were(saved, tmp_path_factory, check, data):
    check(saved, tmp_path_factory.getbasetemp(), data)
