"""Predicting: one function, one method and one command line, and all see the same classes."""

import importlib
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import warm
from conftest import TINY
from PIL import Image

from eomt.data.camvid import CAMVID
from eomt.data.cityscapes import CITYSCAPES, TRAIN_ID_OF_ID
from eomt.inference.folder_prediction import confidence_picture
from eomt.inference.prediction import overlay, predict, predict_images, read_image, to_image
from eomt.inference.windows import segment, segment_images
from eomt.training.mask_classification_semantic import MaskClassificationSemantic

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "scripts" / "predict.py"
SIZES = {"a": (64, 128), "b": (80, 100), "c": (50, 220)}  # windows: 1, 2 and 3


def build(classes=CITYSCAPES):
    torch.manual_seed(0)
    names = {"class_names": list(classes.names), "class_colors": [list(color) for color in classes.colors]}
    module = MaskClassificationSemantic(**{**TINY, **names, "num_classes": len(classes)}).eval()
    with torch.no_grad():  # a random network that sees several classes
        module.network.class_head.weight.mul_(20)
        module.network.mask_head[-1].weight.mul_(20)
    return module


@pytest.fixture(scope="module")
def module():
    return build()


@pytest.fixture(scope="module")
def model(module, tmp_path_factory):
    folder = tmp_path_factory.mktemp("networks") / "model"
    module.save_pretrained(folder)
    return folder


def draw(size, seed=0):
    """Blocks of colour, uint8 [3, H, W]."""
    blocks = torch.randint(0, 256, (1, 3, 4, 8), generator=torch.Generator().manual_seed(seed)).float()
    return torch.nn.functional.interpolate(blocks, size, mode="nearest")[0].byte()


def save(image, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    return path


def values(path):
    return torch.from_numpy(np.array(Image.open(path)))


def run(*arguments, code=0):
    result = subprocess.run(
        [warm.python(), str(SCRIPT), *map(str, arguments)],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == code, result.stdout[-2000:] + result.stderr[-2000:]
    assert "Traceback" not in result.stderr
    return result


def main(monkeypatch, *arguments):
    """The same in this process, which has loaded torch already."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
    return importlib.import_module("predict").main()


@pytest.mark.parametrize("size", SIZES.values())
def test_the_class_map_is_the_best_score_of_each_pixel(module, size):
    image = draw(size)
    labels = predict(module.network, image)
    assert labels.dtype == torch.uint8 and labels.shape == size and len(labels.unique()) > 2
    assert torch.equal(labels.long(), segment(module.network, image).argmax(0))


def test_a_file_a_picture_an_array_and_a_tensor_give_one_map(module, tmp_path):
    image = draw((80, 100))
    path = save(image, tmp_path / "image.png")
    expected = module.predict(image)
    array = np.array(Image.open(path))
    mirrored = np.ascontiguousarray(array[:, ::-1])[:, ::-1]  # a view that runs backwards
    for same in (path, str(path), Image.open(path), array, mirrored):
        assert torch.equal(module.predict(same), expected)


def test_images_of_different_sizes_go_through_the_network_together_and_score_as_one_by_one(module):
    images = [draw(size, seed) for seed, size in enumerate(SIZES.values())]
    forwards = []
    hook = module.network.register_forward_pre_hook(lambda _, inputs: forwards.append(len(inputs[0])))
    together = segment_images(module.network, images)
    hook.remove()
    assert forwards == [6]
    for scores, image in zip(together, images, strict=True):
        torch.testing.assert_close(scores, segment(module.network, image), atol=1e-4, rtol=0)
    for labels, image in zip(predict_images(module.network, images), images, strict=True):
        assert (labels == predict(module.network, image)).float().mean() > 0.999


def test_predicting_evaluates_and_leaves_every_module_in_its_mode(module):
    network = module.network.train()
    network.encoder.eval()
    during = []
    hook = network.mask_head.register_forward_pre_hook(lambda part, _: during.append(part.training))
    predict(network, draw((64, 128)))
    hook.remove()
    after = network.training, network.mask_head.training, network.encoder.training
    module.eval()
    assert during == [False] and after == (True, True, False)


@pytest.mark.parametrize(
    ("image", "sentence"),
    [
        (torch.rand(3, 8, 8), r"torch.float32: give a tensor uint8 \[3, H, W\] with values 0..255, not normalised"),
        (np.random.rand(8, 8, 3), r"float64: give an array uint8 \[H, W, 3\] with values 0..255, not normalised"),
        (torch.zeros(8, 8, 3, dtype=torch.uint8), r"shape \[8, 8, 3\]: give a tensor uint8 \[3, H, W\]"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), r"shape \[1, 3, 8, 8\]"),
        (np.zeros((8, 8), np.uint8), r"shape \[8, 8\]: give an array uint8 \[H, W, 3\]"),
        (np.zeros((3, 8, 8), np.uint8), r"shape \[3, 8, 8\]"),
        (np.zeros((0, 8, 3), np.uint8), r"shape \[0, 8, 3\]"),
        (Image.new("F", (8, 8)), "32-bit pixels"),
    ],
)
def test_what_may_be_normalised_or_turned_is_refused(image, sentence):
    with pytest.raises(ValueError, match=sentence):
        to_image(image)


def test_something_else_is_no_image():
    with pytest.raises(TypeError, match="list is no image: give a path"):
        to_image([1, 2])


def test_a_photograph_is_turned_upright(tmp_path):
    image = draw((64, 128))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees, clockwise
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "photo.png", exif=exif)
    upright = image.rot90(-1, (1, 2))
    assert torch.equal(read_image(tmp_path / "photo.png"), upright)
    assert torch.equal(to_image(Image.open(tmp_path / "photo.png")), upright)


def test_sixteen_bits_palettes_and_transparency_become_eight_bit_colours(tmp_path):
    gray = np.array([[0, 255, 256, 65535]], np.uint16)
    Image.fromarray(gray).save(tmp_path / "deep.png")
    assert read_image(tmp_path / "deep.png")[:, 0].tolist() == [[0, 0, 1, 255]] * 3

    palette = Image.fromarray(np.array([[0, 1]], np.uint8), "L").convert("P")
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.save(tmp_path / "palette.png", transparency=bytes([128, 0]))
    warnings.simplefilter("error")  # of Pillow's, about such palettes
    assert read_image(tmp_path / "palette.png")[:, 0].T.tolist() == [[255, 0, 0], [0, 0, 255]]

    Image.new("RGBA", (2, 1), (10, 20, 30, 0)).save(tmp_path / "alpha.png")
    assert read_image(tmp_path / "alpha.png")[:, 0, 0].tolist() == [10, 20, 30]


def test_a_broken_file_is_named(tmp_path):
    path = save(draw((64, 128)), tmp_path / "half.png")
    path.write_bytes(path.read_bytes()[:150])
    with pytest.raises(ValueError, match=r"half\.png cannot be decoded as a picture"):
        read_image(path)


def test_a_folder_is_written_with_its_subfolders_and_a_broken_file_is_skipped(module, model, tmp_path):
    images = {name: save(draw(size), tmp_path / "in" / f"{name}.png") for name, size in SIZES.items()}
    images["sub/a"] = save(draw((70, 90), seed=3), tmp_path / "in" / "sub" / "a.bmp")
    (tmp_path / "in" / "broken.jpg").write_text("no picture")
    (tmp_path / "in" / "notes.txt").write_text("no picture")
    out = tmp_path / "out"
    result = run(model, tmp_path / "in", out, "--batch-size", 3, code=1)
    assert "broken.jpg cannot be decoded" in result.stderr and "error: 1 of 5 inputs were skipped" in result.stderr
    assert "road" in result.stdout and f"4 images written to {out}" in result.stdout.replace("\n", "")
    written = {path.relative_to(out).as_posix() for path in out.rglob("*.png")}
    assert written == {f"{kind}/{name}.png" for kind in ("overlay", "index", "color") for name in images} | {
        "legend.png"
    }
    for name, path in images.items():
        labels = values(out / "index" / f"{name}.png")
        assert labels.dtype == torch.uint8 and len(labels.unique()) > 2
        assert (labels == module.predict(path)).float().mean() > 0.999
        assert torch.equal(values(out / "color" / f"{name}.png"), CITYSCAPES.colorize(labels))
        assert np.array_equal(values(out / "overlay" / f"{name}.png"), overlay(read_image(path), labels, CITYSCAPES))


def test_confidence_is_the_winning_score_of_each_pixel_in_thousandths_of_16_bits(module, model, tmp_path, monkeypatch):
    for name, size in SIZES.items():
        save(draw(size), tmp_path / "in" / f"{name}.png")
    arguments = (model, tmp_path / "in", tmp_path / "out", "--confidence", "--device", "cpu")
    assert main(monkeypatch, *arguments, "--write", "index") == 0
    written = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.*")}
    assert written == {f"{kind}/{name}.png" for kind in ("index", "confidence") for name in SIZES} | {"legend.png"}
    for name, size in SIZES.items():
        found = Image.open(tmp_path / "out" / "confidence" / f"{name}.png")
        best, labels = segment(module.network, read_image(tmp_path / "in" / f"{name}.png")).max(0)
        assert found.mode == "I;16" and found.size == size[::-1] and best.max() > 1  # no share of a whole
        assert np.abs(np.array(found) / 1000 - best.numpy()).max() <= 1e-3
        assert (values(tmp_path / "out" / "index" / f"{name}.png") == labels).float().mean() > 0.999


def test_a_score_beyond_16_bits_is_the_largest_value():
    picture = confidence_picture(torch.tensor([[0.0, 0.0004, 0.0006, 65.535, 70.0]]))
    assert np.array(picture).tolist() == [[0, 0, 1, 65535, 65535]]


def test_a_pattern_chooses_images_and_write_chooses_pictures(model, tmp_path):
    for name in ("day/1_front.png", "day/1_rear.png", "night/1_front.png"):
        save(draw((64, 128)), tmp_path / "in" / name)
    run(model, tmp_path / "in" / "*" / "*_front.png", tmp_path / "in" / "out", "--write", "index")
    written = {path.relative_to(tmp_path / "in" / "out").as_posix() for path in (tmp_path / "in" / "out").rglob("*.*")}
    assert written == {"index/day/1_front.png", "index/night/1_front.png", "legend.png"}


def test_an_overlay_is_half_image_and_half_class_colours():
    image, labels = torch.full((3, 1, 2), 100, dtype=torch.uint8), torch.tensor([[0, 1]], dtype=torch.uint8)
    picture = np.array(overlay(image, labels, CITYSCAPES))
    assert picture[0].tolist() == [[114, 82, 114], [172, 67, 166]]  # road (128, 64, 128), sidewalk (244, 35, 232)


def test_a_submission_holds_label_ids_under_names_that_the_benchmark_finds(module, model, tmp_path):
    path = save(draw((80, 100)), tmp_path / "in" / "berlin" / "berlin_000000_000019_leftImg8bit.png")
    run(model, tmp_path / "in", tmp_path / "out", "--cityscapes-submission")
    (written,) = (path for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert written.name.startswith("berlin_000000_000019_") and written.suffix == ".png"
    ids = values(written)
    assert ids.shape == (80, 100) and ids.dtype == torch.uint8 and ids.min() >= 7 and ids.max() <= 33
    train_ids = torch.tensor([TRAIN_ID_OF_ID[i] for i in range(34)])[ids.long()]
    assert len(train_ids.unique()) > 2 and torch.equal(train_ids, module.predict(path).long())


def test_a_submission_of_other_classes_is_refused(tmp_path, monkeypatch, capsys):
    build(CAMVID).save_pretrained(tmp_path / "model")
    save(draw((64, 128)), tmp_path / "berlin_000000_000019_leftImg8bit.png")
    assert main(monkeypatch, tmp_path / "model", tmp_path, tmp_path / "out", "--cityscapes-submission") == 1
    assert "needs a network of the 19 Cityscapes classes, this one has 11 (sky, " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("files", "arguments", "sentence"),
    [
        ([], [], "no image (.png, "),
        (["a.png", "a.jpg"], [], "a.png would both be written to a.png"),
        (["out/a.png"], [], "no image"),
        (["a.png"], ["--cityscapes-submission"], "a.png: a benchmark image is named like berlin_"),
        (
            ["x/ulm_000000_000001_a.png", "x/ulm_000000_000001_b.png"],
            ["--cityscapes-submission"],
            "ulm_000000_000001_b.png would both be written to ulm_000000_000001",
        ),
        (
            ["ulm_000000_000001_a.png", "out/old.png"],
            ["--cityscapes-submission"],
            "old.png is in the way",
        ),
    ],
)
def test_a_wrong_input_is_one_sentence_before_any_work(tmp_path, monkeypatch, capsys, files, arguments, sentence):
    for name in files:
        save(draw((8, 8)), tmp_path / name)
    assert main(monkeypatch, tmp_path / "no_model", tmp_path, tmp_path / "out", *arguments) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and sentence in line


def test_a_video_is_no_submission_and_is_not_written_over(tmp_path, monkeypatch, capsys):
    path = tmp_path / "overlay.mp4"
    path.touch()
    assert main(monkeypatch, "model", path, tmp_path / "out", "--cityscapes-submission") == 1
    assert "is a video: a Cityscapes submission is made of" in capsys.readouterr().err
    assert main(monkeypatch, "model", path, tmp_path) == 1
    assert "overlay.mp4 would be overwritten" in capsys.readouterr().err


def test_a_missing_input_model_or_gpu_and_an_output_that_is_a_file_are_named(tmp_path, monkeypatch, capsys):
    image = save(draw((8, 8)), tmp_path / "a.png")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "eomt_config.json").write_text('{"init": {"img_size": [64, 64], "num_classes": 3}}')
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for arguments, sentence in (
        (("model", tmp_path / "nowhere", tmp_path / "out"), "nowhere: no such file or folder"),
        ((tmp_path / "no_model", image, tmp_path / "out"), "no_model"),
        (("model", image, image), "a.png is a file: name a folder"),
        ((tmp_path / "model", image, tmp_path / "out", "--device", "cuda"), "torch sees no GPU"),
    ):
        assert main(monkeypatch, *arguments) == 1
        assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--wirte"], "unrecognized arguments: --wirte"),
        (["--batch-size", "0"], "0: give a whole number from 1 on"),
        (["--write", "masks"], "invalid choice: 'masks'"),
        (["--write", "index", "--cityscapes-submission"], "leave --write out"),
        (["--confidence", "--cityscapes-submission"], "leave --confidence out"),
    ],
)
def test_a_mistyped_command_ends_with_code_2(monkeypatch, capsys, arguments, sentence):
    with pytest.raises(SystemExit, match="2"):
        main(monkeypatch, "model", "in", "out", *arguments)
    assert sentence in capsys.readouterr().err


def film(path, pictures, rate=12):
    """A lossless-looking little video."""
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "1"})
        stream.height, stream.width, stream.pix_fmt = *pictures[0].shape[1:], "yuv420p"
        for picture in pictures:
            frame = av.VideoFrame.from_ndarray(picture.permute(1, 2, 0).numpy().copy(), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def frames(path):
    av = pytest.importorskip("av")
    with av.open(str(path)) as container:
        arrays = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        return container.streams.video[0].average_rate, [to_image(array) for array in arrays]


def test_a_video_becomes_an_overlay_of_its_frames_at_its_rate(module, model, tmp_path):
    path = film(tmp_path / "drive.mp4", [draw((64, 96), seed) for seed in range(6)])
    run(model, path, tmp_path / "out", "--write", "index")
    rate, shown = frames(tmp_path / "out" / "overlay.mp4")
    _, read = frames(path)
    assert rate == 12 and len(shown) == 6
    assert sorted(p.name for p in (tmp_path / "out" / "index").iterdir()) == [f"{i:06d}.png" for i in range(6)]
    for i, (frame, overlaid) in enumerate(zip(read, shown, strict=True)):
        labels = values(tmp_path / "out" / "index" / f"{i:06d}.png")
        assert (labels == module.predict(frame)).float().mean() > 0.999
        expected = np.array(overlay(frame, labels, CITYSCAPES)).astype(float)
        assert abs(overlaid.permute(1, 2, 0).numpy() - expected).mean() < 15  # half the colours, and compressed


def test_a_video_filmed_sideways_is_turned_upright(model, tmp_path):
    path = film(tmp_path / "phone.mp4", [draw((64, 98))] * 2)
    straight, turned = ([1, 0, 0, 0, 1, 0, 0, 0, 0x4000], [0, 1, 0, 0xFFFF, 0, 0, 0, 0, 0x4000])
    matrix, rotated = (b"".join(v.to_bytes(2, "big") + b"\0\0" for v in m) for m in (straight, turned))
    data = path.read_bytes()
    start = data.index(matrix, data.index(b"tkhd"))
    path.write_bytes(data[:start] + rotated + data[start + len(rotated) :])
    run(model, path, tmp_path / "out")
    _, shown = frames(tmp_path / "out" / "overlay.mp4")
    assert shown[0].shape == (3, 98, 64) and not (tmp_path / "out" / "overlay").exists()


def test_a_broken_video_and_missing_pyav_are_said_in_a_sentence(tmp_path):
    (tmp_path / "drive.mp4").write_text("no video")
    code = "import runpy, sys; sys.modules['av'] = None; sys.argv = sys.argv[1:]; sys.path.insert(0, sys.argv.pop(0))\n"
    code += "runpy.run_path(sys.argv[0], run_name='__main__')"
    arguments = [str(SCRIPT), "model", str(tmp_path / "drive.mp4"), str(tmp_path / "out")]
    command = [sys.executable, "-c", code, str(SCRIPT.parent), *arguments]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1 and result.stderr == "error: videos need PyAV: pip install av\n"
    pytest.importorskip("av")
    assert "drive.mp4 is broken or no video" in run(*arguments[1:], code=1).stderr


def test_names_of_classes_cannot_steer_the_screen(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    show = importlib.import_module("predict").show
    show(SimpleNamespace(names=("\x1b[2Jroad",)), SimpleNamespace(pixels=torch.tensor([4])))
    said = capsys.readouterr().out
    assert "\\x1b[2Jroad" in said and "\x1b" not in said


def test_help_has_examples_and_loads_no_torch():
    result = run("--help")
    assert result.stdout.count("python scripts/predict.py ") >= 4 and "--cityscapes-submission" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 120
    check = "import sys; sys.path.insert(0, 'scripts'); import predict; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True).returncode == 0
