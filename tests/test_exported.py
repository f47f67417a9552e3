"""ONNX files and packages of torch.export: what they hold, that they agree with the network, and predict.py on them."""

import copy
import importlib
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from test_predict import SIZES, build, draw, main, save, values
from test_pretrained import trained

from benchmarks.peer import published_dinov3
from eomt.exchange import extras, halves, onnx_export
from eomt.exchange.deployed import Agreement, Deployed, Signature, check_agreement, describe
from eomt.exchange.hf import write_hf
from eomt.exchange.onnx_export import export_onnx
from eomt.exchange.onnx_scorer import METADATA, OnnxScorer, description
from eomt.exchange.opening import open_merged
from eomt.exchange.quantised import quantise, saved_bytes
from eomt.exchange.torch_package import DESCRIPTION, export_package
from eomt.inference.crops import draw_crops
from eomt.inference.prediction import TorchScorer, read_image
from eomt.inference.windows import segment
from eomt.training.mask_classification_semantic import MaskClassificationSemantic

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
ROOT = Path(__file__).parent.parent
CROPS = torch.stack([draw((64, 128), seed) for seed in range(4)])
to_onnx = onnx_export.to_onnx


@pytest.fixture(scope="module")
def module():
    return build()


@pytest.fixture(scope="module")
def graph(module):
    """The graph of the default file; exporting takes the longest."""
    return to_onnx(module.network, Signature())


@pytest.fixture
def exported(graph, monkeypatch):
    monkeypatch.setattr(onnx_export, "to_onnx", lambda *_: copy.deepcopy(graph))


@pytest.fixture
def file(module, exported, tmp_path):
    export_onnx(module, tmp_path / "network.onnx", CROPS)
    return tmp_path / "network.onnx"


def convert(monkeypatch, *arguments):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("convert").main(list(map(str, arguments)))


def same_maps(found, expected):
    for (labels, scores), (wanted, best) in zip(found, expected, strict=True):
        assert labels.shape == wanted.shape and labels.dtype == torch.uint8
        assert (labels == wanted).float().mean() > 0.999
        torch.testing.assert_close(scores, best, atol=1e-3, rtol=0)


def test_a_file_takes_bytes_in_any_number_and_gives_the_score_of_each_class_for_each_pixel(module, file):
    scorer = OnnxScorer(file)
    (taken,), (given,) = scorer.session.get_inputs(), scorer.session.get_outputs()
    assert (taken.name, taken.type, taken.shape[1:]) == ("images", "tensor(uint8)", [3, 64, 128])
    assert (given.name, given.type, given.shape[1:]) == ("logits", "tensor(float)", [19, 64, 128])
    assert isinstance(taken.shape[0], str)  # a name: any number
    for batch in (CROPS[:1], CROPS[:3]):
        (scores,) = scorer.run(batch)
        for each, image in zip(scores, batch, strict=True):
            torch.testing.assert_close(each, segment(module.network, image), atol=1e-3, rtol=0)


def test_a_file_knows_its_classes_sizes_and_statistics(module, file):
    facts = OnnxScorer(file).facts
    assert facts["class_names"] == module.class_names and facts["class_colors"][0] == [128, 64, 128]
    assert facts["img_size"] == [64, 128] and facts["precision"] == "fp32" and facts["batch"] is None
    assert facts["pixel_mean"] == module.network.encoder.pixel_mean.flatten().tolist()


def test_files_say_nothing_of_the_folders_of_the_machine_that_wrote_them(module, file, tmp_path):
    export_package(module, tmp_path / "network.pt2", CROPS)
    with zipfile.ZipFile(tmp_path / "network.pt2") as package:
        written = [file.read_bytes(), *map(package.read, package.namelist())]
    places = (b"site-packages", str(ROOT).encode(), str(Path(torch.__file__).parent).encode())
    assert not [place for place in places for each in written if place in each]


def test_images_of_any_size_are_scored_by_windows_as_in_torch(module, file):
    images = [draw(size, seed) for seed, size in enumerate(SIZES.values())]
    same_maps(OnnxScorer(file)(images), TorchScorer(module.network)(images))


def test_predict_writes_the_same_files_from_an_onnx_file_alone(module, file, tmp_path, monkeypatch):
    module.save_pretrained(tmp_path / "model")
    for name, size in SIZES.items():
        save(draw(size), tmp_path / "in" / f"berlin_000000_00000{name}.png")
    for network, out in ((file, "of_onnx"), (tmp_path / "model", "of_torch")):
        assert main(monkeypatch, network, tmp_path / "in", tmp_path / out, "--confidence", "--device", "cpu") == 0
    written = [
        {path.relative_to(tmp_path / out).as_posix() for path in (tmp_path / out).rglob("*.*")}
        for out in ("of_onnx", "of_torch")
    ]
    assert written[0] == written[1] and len(written[0]) == 4 * len(SIZES) + 1
    for name in written[0] - {"legend.png"}:
        ours, theirs = (values(tmp_path / out / name).long() for out in ("of_onnx", "of_torch"))
        apart = 1 if "confidence" in name else 0
        assert ((ours - theirs).abs() <= apart).float().mean() > 0.999


DESCRIBED = {"schema": 1, "img_size": [64, 128], "outputs": "classes", "images": "uint8", "batch": None}
DESCRIBED |= {"class_names": ["a", "b"], "class_colors": [[0, 0, 0], [1, 2, 3]]}
WRONG = [("img_size", [64]), ("img_size", [64, 0]), ("outputs", "masks"), ("images", "int8"), ("batch", 0)]
WRONG += [
    ("batch", "2"),
    ("class_names", [1, 2]),
    ("class_colors", [[0, 0, 0]]),
    ("class_colors", [[0, 0], [1, 300, 3]]),
]


@pytest.mark.parametrize(("name", "value"), [*WRONG, *((name, ...) for name in DESCRIBED if name != "schema")])
def test_a_description_that_lacks_something_or_says_what_cannot_be_is_refused_naming_it(name, value):
    facts = DESCRIBED | {name: value}
    written = json.dumps({key: value for key, value in facts.items() if value is not ...})
    meta = SimpleNamespace(custom_metadata_map={METADATA: written})
    session = SimpleNamespace(get_modelmeta=lambda: meta)
    with pytest.raises(ValueError, match=rf"network.onnx.*{name}"):
        description(session, Path("network.onnx"))


def test_a_description_as_it_is_written_passes(module):
    written = json.dumps(describe(module, Signature(), "fp32"))
    meta = SimpleNamespace(custom_metadata_map={METADATA: written})
    assert description(SimpleNamespace(get_modelmeta=lambda: meta), Path("x.onnx"))["batch"] is None


def test_predict_writes_a_submission_from_an_onnx_file(file, tmp_path, monkeypatch):
    save(draw((64, 128)), tmp_path / "in" / "berlin_000000_000019_leftImg8bit.png")
    assert main(monkeypatch, file, tmp_path / "in", tmp_path / "out", "--cityscapes-submission") == 0
    (written,) = (path for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert values(written).min() >= 7


@pytest.mark.parametrize("precision", ["fp16-arithmetic", "int8-weights", "int8-dynamic"])
def test_a_smaller_file_takes_and_gives_the_same_types(module, exported, file, tmp_path, precision):
    small = tmp_path / "small.onnx"
    found = export_onnx(module, small, CROPS, precision=precision).agreement
    assert found.same > 0.9 and small.stat().st_size < 0.7 * file.stat().st_size
    session = OnnxScorer(small).session
    assert [each.type for each in (*session.get_inputs(), *session.get_outputs())] == ["tensor(uint8)", "tensor(float)"]
    assert OnnxScorer(small).facts["precision"] == precision
    onnx_export.checked(onnx.load(small))  # ONNX's own checker, and its strict inference of shapes


def test_weights_in_halves_hold_what_a_file_in_32_bits_holds(module, file, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_export, "to_onnx", to_onnx)  # of the rounded network
    small = tmp_path / "small.onnx"
    written = export_onnx(module, small, CROPS, precision="fp16")
    assert written.agreement.difference <= 1e-3 and written.agreement.same >= 0.999
    assert f"of {len(module.network.encoder.blocks) + 1} parts" in str(written)
    assert small.stat().st_size < 0.75 * file.stat().st_size
    session = OnnxScorer(small).session
    assert [each.type for each in (*session.get_inputs(), *session.get_outputs())] == ["tensor(uint8)", "tensor(float)"]
    onnx_export.checked(onnx.load(small))


def test_a_network_that_halves_would_change_keeps_its_last_parts_as_they_are(module):
    found = [
        halves.with_halved_weights(module, Signature(), CROPS, Agreement(difference, 0.0))
        for difference in (1.0, 1e-3, 0.0)
    ]
    whole, some, none = (each.network for each in found)
    own, depth = module.network.state_dict(), len(module.network.encoder.blocks)
    assert found[0].kept == 0 < found[1].kept < found[2].kept == found[2].parts == depth + 1
    assert str(found[0]) == f"the weights of all {depth + 1} parts are in 16 bits (each block, and the heads)"
    assert f"the weights of the last {found[1].kept} of {depth + 1} parts stay in float32" in str(found[1])
    assert "float32" in str(found[2]) and "int8-weights" in str(found[2])
    same = [
        {key for key, tensor in each.state_dict().items() if torch.equal(tensor, own[key])} for each in (whole, some)
    ]
    assert same[0] < same[1] < own.keys() and "class_head.weight" in same[1] - same[0]
    assert f"encoder.backbone.blocks.{depth - 1}.attn.qkv.weight" not in same[0]
    assert all(torch.equal(tensor, own[key]) for key, tensor in none.state_dict().items())
    assert torch.equal(module.network.q.weight, own["q.weight"])


def test_arithmetic_in_halves_leaves_the_scores_in_32_bits(graph):
    half = halves.in_half_arithmetic(copy.deepcopy(graph))
    scoring = set(halves.behind(graph, "Resize"))
    kept = {node.name for node in half.graph.node if node.name in scoring and "Cast" not in node.op_type}
    assert len(kept) > 3 and kept == scoring - {node.name for node in graph.graph.node if node.op_type == "Cast"}


def test_with_a_fixed_batch_every_shape_is_known_and_more_windows_than_that_are_taken_in_turns(module, tmp_path):
    signature = Signature("queries", "float", batch=2)
    export_onnx(module, tmp_path / "static.onnx", CROPS[:3], signature)
    model = onnx.load(tmp_path / "static.onnx")
    model = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    shapes = {value.name: value.type.tensor_type.shape for value in (*model.graph.value_info, *model.graph.output)}
    made = {name for node in model.graph.node for name in node.output}
    assert made <= shapes.keys() and all(dim.HasField("dim_value") for s in shapes.values() for dim in s.dim)
    scorer = OnnxScorer(tmp_path / "static.onnx")
    assert [each.name for each in scorer.session.get_outputs()] == ["mask_logits", "class_logits"]
    images = [draw((50, 220))]  # three windows
    same_maps(scorer(images), TorchScorer(module.network)(images))


@pytest.fixture(scope="module")
def rotary():
    """A network whose positions are computed from the grid."""
    from test_other_programs import DINOV3, settings_of

    torch.manual_seed(0)
    module = MaskClassificationSemantic(**settings_of(DINOV3)).eval()
    with torch.no_grad():
        module.network.class_head.weight.mul_(20)
        module.network.mask_head[-1].weight.mul_(20)
    return module


def test_a_file_of_free_size_is_the_network_that_is_built_for_each_size(rotary, tmp_path):
    path = tmp_path / "network.onnx"
    export_onnx(rotary, path, torch.stack([draw((64, 64), seed) for seed in range(2)]), Signature(size="free"))
    run, facts = OnnxScorer(path).run, OnnxScorer(path).facts
    assert facts["size"] == "free" and facts["img_size"] == [64, 64]
    for size in ((64, 64), (32, 96), (96, 48)):
        other = MaskClassificationSemantic(**{**rotary.hparams, "img_size": list(size)}).eval()
        other.load_state_dict(rotary.state_dict())
        images = torch.stack([draw(size, seed) for seed in range(3)])
        with torch.no_grad():
            torch.testing.assert_close(run(images)[0], Deployed(other.network)(images)[0], atol=1e-3, rtol=0)
    (cut,), (whole,) = run(draw((70, 90))[None]), run(draw((70, 90))[None, :, :64, :80])
    torch.testing.assert_close(cut, whole, atol=1e-5, rtol=0)  # pixels that no whole patch covers have no scores
    assert rotary.network.encoder.img_size == (64, 64) and not rotary.network.encoder.resized


def test_a_free_size_is_refused_where_positions_were_learnt_for_one(module, tmp_path, call_script):
    module.save_pretrained(tmp_path / "model")
    out = tmp_path / "network.onnx"
    code, said = call_script("convert.py", tmp_path / "model", out, "--to", "onnx", "--size", "free")
    assert code == 1 and not out.exists()
    assert "--size free: the positions of this backbone were learnt for images of 64x128" in said
    assert "cover larger images by windows" in said


def test_a_file_that_disagrees_is_not_written(module, exported, tmp_path, monkeypatch):
    monkeypatch.setitem(onnx_export.TOLERANCES, "fp16-arithmetic", Agreement(1e-9, 1.0))
    with pytest.raises(
        ValueError, match=r"ONNX file \(fp16-arithmetic\) differs .*: nothing was written; .*fp16 keeps"
    ):
        export_onnx(module, tmp_path / "network.onnx", CROPS, precision="fp16-arithmetic")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("found", [Agreement(float("nan"), 1.0), Agreement(1.0, float("nan")), Agreement(0.0, 0.5)])
def test_what_is_no_number_or_another_class_disagrees(found):
    with pytest.raises(ValueError, match="nothing was written"):
        check_agreement(found, Agreement(1.1, 0.9), "the file", "do this")


def test_a_network_that_one_file_cannot_hold_is_refused_before_it_is_traced(module, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_export, "LIMIT", 1000)
    with pytest.raises(ValueError, match=r"one ONNX file holds 2 GiB at most: write a package of torch\.export"):
        export_onnx(module, tmp_path / "network.onnx", CROPS)


def test_an_adapter_becomes_a_package_that_a_process_without_this_project_runs(tmp_path, monkeypatch, capsys):
    base = trained(seed=3)
    base.save_pretrained(tmp_path / "base")
    adapted = trained(use_lora=True, ckpt_path=str(tmp_path / "base"))
    adapted.save_pretrained(tmp_path / "run" / "adapter")
    file = tmp_path / "network.pt2"
    assert convert(monkeypatch, tmp_path / "run" / "adapter", file, "--to", "pt2") == 0
    assert "4 crops of drawn toy streets, since no --images are given" in capsys.readouterr().out
    size = adapted.network.encoder.img_size
    images = torch.stack([draw(size, seed) for seed in range(3)])
    with torch.no_grad():
        expected = Deployed(adapted.network)(images)
    torch.save(images, tmp_path / "images.pt")
    names = ("eomt", "timm", "peft", "lightning")
    code = f"import json, sys\nfor name in {names}: sys.modules[name] = None\nimport torch\n"
    code += f"extra = {{{DESCRIPTION!r}: ''}}\nprogram = torch.export.load('network.pt2', extra_files=extra).module()\n"
    code += f"facts = json.loads(extra[{DESCRIPTION!r}])\nassert facts['img_size'] == {list(size)}\n"
    code += "torch.save(program(torch.load('images.pt')), 'logits.pt')"
    subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, check=True)
    (logits,) = torch.load(tmp_path / "logits.pt")
    torch.testing.assert_close(logits, expected[0], atol=1e-3, rtol=0)


def test_the_scores_are_those_that_windows_give_in_strips(module):
    with torch.no_grad():
        (scores,) = Deployed(module.network)(CROPS)
    for each, image in zip(scores, CROPS, strict=True):
        torch.testing.assert_close(each, segment(module.network, image), atol=1e-4, rtol=0)


def test_an_onnx_file_of_another_program_a_broken_and_a_missing_one_are_named(
    module, graph, tmp_path, monkeypatch, capsys
):
    image = save(draw((8, 8)), tmp_path / "a.png")
    onnx.save(graph, tmp_path / "foreign.onnx")
    (tmp_path / "broken.onnx").write_bytes(b"no network")
    later = copy.deepcopy(graph)
    later.metadata_props.add(key="eomt", value=json.dumps({"schema": 99}))
    onnx.save(later, tmp_path / "later.onnx")
    for name, sentence in (
        ("foreign", "is an ONNX file of another program (it takes images tensor(uint8)"),
        ("broken", "broken.onnx cannot be opened by onnxruntime"),
        ("later", "install the version that wrote it, or a later one"),
        ("missing", "missing.onnx: no such file"),
    ):
        assert main(monkeypatch, tmp_path / f"{name}.onnx", image, tmp_path / "out") == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and sentence in line


def test_without_its_packages_the_extra_to_install_is_named(module, tmp_path, monkeypatch, capsys):
    module.save_pretrained(tmp_path / "model")
    monkeypatch.setattr(extras.importlib.util, "find_spec", lambda name: None)
    assert convert(monkeypatch, tmp_path / "model", tmp_path / "network.onnx", "--to", "onnx") == 1
    said = capsys.readouterr().err
    assert said == 'error: --to onnx needs onnx and onnxscript and onnxruntime: pip install "eomt-lora[onnx]"\n'


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["out", "--to", "onnx"], "OUT out: the file is known by its ending; name it out.onnx"),
        (["out", "--to", "eomt", "--batch", "2"], "--batch is not for --to eomt"),
        (["out.pt2", "--to", "pt2", "--precision", "fp16"], "--precision is not for --to pt2"),
        (["out.pt2", "--to", "pt2", "--size", "free"], "--size is not for --to pt2"),
        (["out.onnx", "--to", "onnx", "--batch", "0"], "0: give a whole number from 1 on"),
    ],
)
def test_options_that_a_target_does_not_have_are_refused(arguments, sentence, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="2"):
        convert(monkeypatch, "model", *arguments)
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("option", [["--precision", "32-true"], ["--ckpt_path", "x"], ["--backbone_weights", "x"]])
def test_what_an_onnx_file_has_in_it_is_not_given_again(option, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(monkeypatch, "network.onnx", "in", "out", *option)
    assert f"{option[0]} is for networks of torch" in capsys.readouterr().err


@pytest.mark.parametrize("ending", ["onnx", "pt2"])
def test_where_a_saved_network_is_meant_an_exported_one_is_named(ending, tmp_path, call_script):
    (tmp_path / f"network.{ending}").touch()
    file = tmp_path / f"network.{ending}"
    for name, words in (
        ("evaluate.py", [file]),
        ("convert.py", [file, tmp_path / "out", "--to", "eomt"]),
        ("../train_with_lora.py", ["data=toy_streets", f"model.ckpt_path={file}", f"output_dir={tmp_path / 'run'}"]),
        ("../train_with_lora.py", ["data=toy_streets", f"model.backbone_weights={file}", f"output_dir={tmp_path}/b"]),
    ):
        code, said = call_script(name, *words)
        assert code == 1 and f"network.{ending} is an exported network" in said, name


@pytest.mark.parametrize("kind", ["weights", "dynamic"])
def test_linear_layers_in_8_bits_keep_the_classes_and_a_part_of_the_bytes(kind):
    pytest.importorskip("torchao")
    module, image = build(), draw((64, 128))
    before, size = module.predict(image), saved_bytes(module.network)
    quantise(module.network, kind)
    assert (module.predict(image) == before).float().mean() > 0.9
    assert saved_bytes(module.network) < 0.75 * size


def test_predict_merges_an_adapter_before_it_rounds_it_to_8_bits(tmp_path, monkeypatch):
    pytest.importorskip("torchao")
    trained(seed=3).save_pretrained(tmp_path / "base")
    adapted = trained(use_lora=True, ckpt_path=str(tmp_path / "base"))
    adapted.save_pretrained(tmp_path / "adapter")
    image = save(draw(adapted.network.encoder.img_size), tmp_path / "a.png")
    arguments = (tmp_path / "adapter", image, tmp_path / "out", "--int8", "weights", "--device", "cpu")
    assert main(monkeypatch, *arguments) == 0
    found, expected = values(tmp_path / "out" / "index" / "a.png"), adapted.eval().predict(image)
    assert (found == expected).float().mean() > 0.9


def test_8_bits_without_their_package_or_in_another_precision_or_file_are_refused(tmp_path, monkeypatch, capsys):
    build().save_pretrained(tmp_path / "model")
    image = save(draw((64, 128)), tmp_path / "a.png")
    for network, more in (("network.onnx", []), ("model", ["--precision", "bf16-mixed"])):
        with pytest.raises(SystemExit, match="2"):
            main(monkeypatch, network, image, "out", "--int8", "dynamic", *more)
        assert "--int8" in capsys.readouterr().err
    monkeypatch.setattr(extras.importlib.util, "find_spec", lambda name: None if name == "torchao" else name)
    assert main(monkeypatch, tmp_path / "model", image, tmp_path / "out", "--int8", "dynamic") == 1
    assert capsys.readouterr().err == 'error: --int8 needs torchao: pip install "eomt-lora[int8]"\n'


@pytest.fixture
def street():
    """A real one, or a drawn one where there is none."""
    root = os.environ.get("EOMT_CAMVID")
    return read_image(min((Path(root) / "val").iterdir())) if root else draw_crops((64, 128))[0]


@pytest.mark.parametrize("name", ["vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3_qkvb"])
def test_ours_published_and_transformers_become_onnx_files_that_give_a_street_the_same_classes(name, tmp_path, street):
    transformers = pytest.importorskip("transformers")
    if "dinov3" in name and not hasattr(transformers, "EomtDinov3ForUniversalSegmentation"):
        pytest.skip("this transformers has no EoMT on DINOv3")
    from test_exchange_hf import network_of, their_classes

    module = network_of(name)
    module.network.attn_mask_probs.zero_()
    write_hf(module, tmp_path / "hf")
    state = load_file(tmp_path / "hf" / "model.safetensors")
    published = published_dinov3(state) if "dinov3" in name else module.state_dict()
    torch.save(published, tmp_path / "published.bin")
    back = open_merged(tmp_path / "hf")
    opened = {"transformers": back, "ours": module}
    opened["published"] = MaskClassificationSemantic(**back.hparams | {"ckpt_path": str(tmp_path / "published.bin")})
    expected = module.predict(street)
    picture = Image.fromarray(street.permute(1, 2, 0).numpy())
    maps = {"in transformers": their_classes(tmp_path / "hf", picture, backend="pil")}
    for what, network in opened.items():
        export_onnx(network.eval(), tmp_path / f"{what}.onnx", torch.stack(draw_crops((64, 64))))
        ((maps[what], _),) = OnnxScorer(tmp_path / f"{what}.onnx")([street])
    assert len(expected.unique()) > 1
    assert not [what for what, labels in maps.items() if (labels == expected).float().mean() <= 0.999]


def test_a_photograph_of_a_street_has_the_same_classes(module, file, street):
    same_maps(OnnxScorer(file)([street]), TorchScorer(module.network)([street]))
