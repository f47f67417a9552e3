"""One forward pass, any number of scores; and the command line that says what they are worth."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import TINY, run_script
from PIL import Image
from sklearn.metrics import average_precision_score

from eomt.anomaly.benchmarks import BENCHMARKS
from eomt.anomaly.components import components, together
from eomt.anomaly.datasets import AnomalyDataset
from eomt.anomaly.evaluation import LogitCache, Result, evaluate, export, score_maps
from eomt.anomaly.metrics import PixelScores
from eomt.anomaly.request import parse
from eomt.anomaly.scores import SCORES, semantic_scores, variants
from eomt.anomaly.toy_anomalies import write_toy_anomalies
from eomt.inference.windows import segment, window_logits
from eomt.reporting.anomaly_pictures import ANOMALOUS, HeatMap, Row, anomaly_picture
from eomt.reporting.anomaly_report import draw, identity, open_datasets
from eomt.training.mask_classification_semantic import MaskClassificationSemantic

SCRIPT = "evaluate_anomaly.py"
SETTINGS = ("data=toy_anomalies", "data.number=4", "data.size=[64,128]")
ALL = variants(list(SCORES), [0.5, 1.0])


def quietly(items, what):
    return items


@pytest.fixture(scope="module")
def module():
    torch.manual_seed(0)
    module = MaskClassificationSemantic(**TINY).eval()
    with torch.no_grad():  # a random network that sees several classes
        module.network.class_head.weight.mul_(20)
        module.network.mask_head[-1].weight.mul_(20)
    return module


@pytest.fixture(scope="module")
def model(module, tmp_path_factory):
    folder = tmp_path_factory.mktemp("networks") / "model"
    module.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    root = tmp_path_factory.mktemp("toys")
    return AnomalyDataset(write_toy_anomalies(str(root), 4, (80, 200)), "toy_anomalies")  # several windows an image


def readers(dataset):
    return [(frame, lambda i=i: dataset.image(i)) for i, frame in enumerate(dataset.frames)]


@pytest.fixture(scope="module")
def cache(module, toys, tmp_path_factory):
    cache = LogitCache(tmp_path_factory.mktemp("logits"))
    cache.fill(module.network, readers(toys))
    return cache


def test_scores_in_strips_are_those_of_the_whole_class_scores(module, toys, monkeypatch):
    image = toys.image(3)
    with torch.no_grad():
        (logits,) = window_logits(module.network, [image])
    whole = segment(module.network, image)
    monkeypatch.setattr("eomt.inference.windows.STRIP_CELLS", 20 * 128 * 7)
    assert len(list(logits.strips())) > 5
    maps = score_maps(logits, ALL)
    assert set(maps) == set(ALL)
    for (name, temperature), scores in maps.items():
        assert scores.shape == tuple(image.shape[1:]) and scores.dtype == np.float32
        if name != "msp_class_t":
            np.testing.assert_allclose(scores, SCORES[name](whole, temperature).numpy(), atol=1e-6)


def test_the_class_temperature_is_that_of_the_class_logits(module):
    image = torch.randint(256, (3, 64, 128), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        (logits,) = window_logits(module.network, [image])
    masks = torch.nn.functional.interpolate(logits.mask_logits, (64, 128), mode="bilinear")
    expected = 1 - semantic_scores(masks, logits.class_logits / 0.5)[0].softmax(0).amax(0)
    maps = score_maps(logits, [("msp_class_t", 0.5), ("msp_class_t", 1.0), ("msp", 1.0)])
    np.testing.assert_allclose(maps["msp_class_t", 0.5], expected, atol=1e-6)
    np.testing.assert_array_equal(maps["msp_class_t", 1.0], maps["msp", 1.0])
    assert abs(maps["msp_class_t", 0.5] - maps["msp", 1.0]).max() > 1e-3


def test_cached_logits_give_the_scores_of_the_network_up_to_float16(module, toys, cache):
    for index, frame in enumerate(toys.frames):
        with torch.no_grad():
            (logits,) = window_logits(module.network, [toys.image(index)])
        read = cache.read(frame)
        assert len(read.origins) > 1 and read[2:] == logits[2:]
        torch.testing.assert_close(read.mask_logits, logits.mask_logits, rtol=2**-11, atol=1e-6)
        cached, plain = score_maps(read, ALL), score_maps(logits, ALL)
        for variant in ALL:
            np.testing.assert_allclose(cached[variant], plain[variant], atol=5e-3)


def test_the_network_runs_once_an_image_whatever_is_asked_and_never_again(module, toys, tmp_path):
    calls = []
    hook = module.network.mask_head.register_forward_hook(lambda *_: calls.append(1))
    try:
        cache = LogitCache(tmp_path)
        cache.fill(module.network, readers(toys))
        after_first = len(calls)
        evaluate(cache, toys, ALL, quietly)
        cache.fill(module.network, readers(toys))
    finally:
        hook.remove()
    assert len(calls) == after_first == len(toys)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{frame}.safetensors" for frame in toys.frames]


@pytest.mark.parametrize("damage", [b"", b"x" * 100, "half", b"\x02" + bytes(7) + b"{}"])
def test_a_cached_file_that_is_damaged_is_computed_again(module, toys, cache, tmp_path, damage):
    own = LogitCache(tmp_path)
    frame, read = readers(toys)[0]
    whole = cache.file(frame).read_bytes()
    own.file(frame).write_bytes(whole[: len(whole) // 2] if damage == "half" else damage)
    own.fill(module.network, [(frame, read)])
    assert torch.equal(own.read(frame).mask_logits, cache.read(frame).mask_logits)


def test_cached_logits_that_are_gone_or_damaged_when_they_are_read_are_one_sentence(cache, tmp_path):
    own = LogitCache(tmp_path)
    own.file("a").write_bytes(b"x" * 100)
    for frame in ("a", "b"):
        with pytest.raises(ValueError, match=rf"{frame}\.safetensors .*; score again"):
            own.read(frame)


@pytest.mark.parametrize("part", ["images", "labels_masks"])
def test_drawn_anomalies_of_which_a_file_is_gone_or_empty_are_drawn_again(tmp_path, part):
    folder = write_toy_anomalies(str(tmp_path), 3, (64, 128))
    files = sorted((folder / part).iterdir())
    whole = [file.read_bytes() for file in files]
    files[0].unlink()
    files[1].write_bytes(b"")
    assert write_toy_anomalies(str(tmp_path), 3, (64, 128)) == folder
    assert [file.read_bytes() for file in files] == whole


def test_logits_that_float16_cannot_hold_are_refused(tmp_path, module, toys):
    with torch.no_grad():
        (logits,) = window_logits(module.network, [toys.image(0)])
    with pytest.raises(ValueError, match="beyond float16"):
        LogitCache(tmp_path).write("x", logits._replace(class_logits=logits.class_logits + 1e5))
    with pytest.raises(ValueError, match="precision 8-bit: choose from 32-true"):
        LogitCache(tmp_path).fill(module.network, readers(toys), precision="8-bit")


def test_results_are_those_of_all_pixels_and_components_together(toys, cache):
    results = evaluate(cache, toys, ALL, quietly)
    assert [(r.score, r.temperature) for r in results] == ALL
    maps = [score_maps(cache.read(frame), ALL) for frame in toys.frames]
    labels = [toys.labels(i).numpy() for i in range(len(toys))]
    valid = np.concatenate([m.ravel() for m in labels]) != 255
    for result in results:
        variant = result.score, result.temperature
        values = np.concatenate([m[variant].ravel() for m in maps])[valid]
        truth = np.concatenate([m.ravel() for m in labels])[valid]
        assert result.pixels.auprc == pytest.approx(average_precision_score(truth, values), abs=1e-6)
        track = toys.benchmark.track
        parts = [components(m[variant], t, result.pixels.threshold, track) for m, t in zip(maps, labels, strict=True)]
        assert result.components.siou.tolist() == together(parts).siou.tolist()
        assert result.components.ppv.tolist() == together(parts).ppv.tolist()
    assert evaluate(cache, toys, ALL[:1], quietly, with_components=False)[0].components is None


def test_images_of_different_sizes_are_one_data_set(module, tmp_path):
    rng = np.random.default_rng(0)
    for part in ("images", "labels_masks"):
        (tmp_path / "fs_static" / part).mkdir(parents=True)
    for k, size in enumerate([(64, 128), (90, 70), (50, 300)]):
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(tmp_path / f"fs_static/images/{k}.jpg")
        Image.fromarray(rng.integers(0, 2, size, dtype=np.uint8)).save(tmp_path / f"fs_static/labels_masks/{k}.png")
    dataset, cache = AnomalyDataset(tmp_path, "fs_static"), LogitCache(tmp_path / "logits")
    cache.fill(module.network, readers(dataset))
    (result,) = evaluate(cache, dataset, [("rba", 1.0)], quietly)
    maps = [score_maps(cache.read(frame), [("rba", 1.0)])["rba", 1.0] for frame in dataset.frames]
    assert [found.shape for found in maps] == [(64, 128), (90, 70), (50, 300)]
    truth = np.concatenate([labels.numpy().ravel() for _, labels in dataset])
    values = np.concatenate([found.ravel() for found in maps])
    assert result.pixels.auprc == pytest.approx(average_precision_score(truth, values), abs=1e-6)


def test_undefined_metrics_are_null():
    facts = Result("msp", 1.0, PixelScores(0.5, 0.1, 0, 0.2, 0.3, 5, 10), together([])).as_dict()
    assert facts["siou"] is facts["ppv"] is facts["component_f1"] is None
    assert facts["auprc"] == 0.5 and facts["valid"] == 10 and json.loads(json.dumps(facts)) == facts


def test_the_export_is_read_back_as_the_benchmark_reads_it(tmp_path):
    h5py = pytest.importorskip("h5py")
    scores = np.linspace(-1, 0, 60, dtype=np.float32).reshape(6, 10)
    folder = export([("validation_1", scores)], tmp_path, "Ours", BENCHMARKS["road_obstacle_21"].export_name)
    assert folder == tmp_path / "anomaly_p" / "Ours" / "ObstacleTrack-all"
    with h5py.File(folder / "validation_1.hdf5") as file:
        assert list(file) == ["value"] and file["value"].dtype == np.float16
        np.testing.assert_array_equal(file["value"][:], scores.astype(np.float16))


# Pictures


def draw_rows(tmp_path, maps, name="a.png"):
    image = np.full((40, 80, 3), 90, np.uint8)
    labels = np.zeros((40, 80), np.uint8)
    labels[20:30, 30:50], labels[:10] = 1, 255
    row = Row("x", image, labels, maps)
    anomaly_picture([row, row], [HeatMap("msp", 0.0, 1.0)] * len(maps), tmp_path / name, "Toys")
    return np.asarray(Image.open(tmp_path / name).convert("RGB")).astype(int)


def test_a_score_has_one_colour_scale_whatever_its_values(tmp_path):
    """What is 0.5 looks alike beside pixels of any other score."""
    beside_low, beside_high = np.full((40, 80), 0.5), np.full((40, 80), 0.5)
    beside_low[:, 40:], beside_high[:, 40:] = 0.2, 0.9
    low, high = (draw_rows(tmp_path, [scores]) for scores in (beside_low, beside_high))
    start, width = 2 * low.shape[1] // 3, low.shape[1] // 3
    left, right = (slice(start, start + int(0.45 * width))), slice(start + int(0.55 * width), None)
    assert (low[:, left] == high[:, left]).all() and (low[:, right] != high[:, right]).any()


def test_the_ground_truth_has_its_colours(tmp_path):
    picture = draw_rows(tmp_path, [np.zeros((40, 80))])
    orange = [int(ANOMALOUS[i : i + 2], 16) for i in (1, 3, 5)]
    shown = (abs(picture - orange).max(-1) < 3).mean()
    black = (picture.max(-1) < 3).mean()
    assert 0.005 < shown < 0.05 and black > shown  # 6 % of a column, and 25 % that are ignored


# The command line


@pytest.fixture(scope="module")
def evaluated(model, tmp_path_factory):
    output = tmp_path_factory.mktemp("results")
    arguments = (*SETTINGS, f"data.root={output}/toys", "scores=[msp,rba,msp_class_t]", "temperatures=[0.5,1.0]")
    result = run_script(
        SCRIPT, model, *arguments, "--pictures", 2, "--output", output, "--export", "rba", "--method", "Ours"
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout, output


def test_the_command_line_prints_and_writes_all_scores(evaluated):
    printed, output = evaluated
    facts = json.loads((output / "toy_anomalies.json").read_text())
    assert {key: facts[key] for key in ("schema_version", "benchmark", "title", "images", "img_size")} == {
        "schema_version": 1,
        "benchmark": "toy_anomalies",
        "title": "Toy anomalies",
        "images": 4,
        "img_size": [64, 128],
    }
    found = [(r["score"], r["temperature"]) for r in facts["results"]]
    assert found == [("msp", 0.5), ("msp", 1.0), ("rba", 1.0), ("msp_class_t", 0.5), ("msp_class_t", 1.0)]
    assert re.fullmatch("sha256:[0-9a-f]{64}", facts["data"])
    keys = "score temperature auprc fpr95 error threshold f1 anomalous valid siou ppv component_f1".split()
    for result in facts["results"]:
        assert list(result) == keys and 0 < result["auprc"] < 1 and 0 <= result["fpr95"] <= 1
        assert f"{100 * result['auprc']:.2f}" in printed and result["valid"] <= 4 * 64 * 128
    assert "4 images" in printed and "anomalous" in printed
    assert Image.open(output / "toy_anomalies.png").size[0] > 1500


def test_the_command_line_exports_every_frame(evaluated):
    h5py = pytest.importorskip("h5py")
    printed, output = evaluated
    folder = output / "anomaly_p" / "Ours" / "ToyAnomalies-val"
    assert str(folder) in printed and len(list(folder.iterdir())) == 4
    with h5py.File(folder / "toy_0003.hdf5") as file:
        assert file["value"].shape == (64, 128) and file["value"].dtype == np.float16 and file["value"][:].max() < 0


def test_test_images_without_labels_are_exported_too(model, tmp_path):
    pytest.importorskip("h5py")
    rng = np.random.default_rng(0)
    folder = tmp_path / "dataset_AnomalyTrack"
    for part in ("images", "labels_masks"):
        (folder / part).mkdir(parents=True)
    for frame in ("validation0000", "cow0001"):
        Image.fromarray(rng.integers(0, 256, (64, 128, 3), dtype=np.uint8)).save(folder / "images" / f"{frame}.jpg")
    labels = (np.indices((64, 128)).sum(0) % 2).astype(np.uint8)
    Image.fromarray(labels).save(folder / "labels_masks" / "validation0000_labels_semantic.png")
    output = tmp_path / "out"
    arguments = (f"data.root={tmp_path}", "scores=rba", "--export", "rba", "--pictures", 0, "--output", output)
    result = run_script(SCRIPT, model, *arguments)
    assert result.returncode == 0, result.stderr[-3000:]
    exported = output / "anomaly_p" / "EoMT-LoRA" / "AnomalyTrack-all"
    assert sorted(path.stem for path in exported.iterdir()) == ["cow0001", "validation0000"]
    assert json.loads((output / "road_anomaly_21.json").read_text())["images"] == 1
    assert not (output / "road_anomaly_21.png").exists()


def test_logits_of_other_weights_are_not_taken_from_the_cache(module, toys):
    torch.manual_seed(0)
    lora = MaskClassificationSemantic(**TINY, use_lora=True, lora_rank=2)
    before = identity(lora, toys, "32-true")
    assert before == identity(lora, toys, "32-true") != identity(lora, toys, "bf16-mixed")
    with torch.no_grad():
        lora.adapter_parameters()[-1].add_(0.1)  # the base is the same
    assert identity(lora, toys, "32-true") != before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.nmber=4"], "error: data.nmber=4 is no setting; did you mean data.number?\n"),
        (["data=toy_anomaly"], "error: data=toy_anomaly is no anomaly benchmark; did you mean toy_anomalies?\n"),
        (["data=toy_anomalies", "scores=[mps]"], "error: scores: 'mps' is unknown; did you mean msp?\n"),
        (["data=toy_anomalies", "scores=[msp"], "error: scores=[msp cannot be read: a list looks like scores=[a,b]\n"),
        (["data=[[fs_static]]"], "error: data=[['fs_static']] must be a value or a list of values\n"),
        (["data=toy_anomalies", "temperatures=[0]"], "error: temperatures: 0 must be a number greater than 0\n"),
        (
            ["data=toy_anomalies", "data.size=64"],
            "error: data.size=64 must be [height,width] of at least 32 pixels each\n",
        ),
        ([], "error: give data.root=FOLDER of the benchmarks, or data=toy_anomalies, which are drawn\n"),
        (
            ["data=fs_static", "data.number=4"],
            "error: data.number, data.size, data.seed are for data=toy_anomalies only; ",
        ),
        (["--export", "energy", "data=toy_anomalies"], "error: --export energy: name one of scores=["),
        (
            ["--export", "msp", "data=toy_anomalies", "temperatures=[0.5,1]"],
            "error: --export msp: there are 2 temperatures, give one with temperatures=[1.0]\n",
        ),
    ],
)
def test_a_mistake_on_the_command_line_is_one_sentence(call_script, tmp_path, words, message):
    code, error = call_script(SCRIPT, tmp_path / "model", *words)
    assert code == 1 and error.startswith(message) and error.count("\n") == 1


def test_a_folder_without_benchmarks_is_one_sentence(call_script, tmp_path):
    code, error = call_script(SCRIPT, tmp_path / "model", f"data.root={tmp_path}")
    assert code == 1 and f"{tmp_path} holds none of RoadAnomaly21, RoadObsticle21" in error and error.count("\n") == 1


def test_a_wrong_label_is_one_sentence_without_traceback(model, tmp_path):
    for part in ("images", "labels_masks"):
        (tmp_path / "fs_static" / part).mkdir(parents=True)
    Image.fromarray(np.zeros((64, 128, 3), np.uint8)).save(tmp_path / "fs_static" / "images" / "0.png")
    Image.fromarray(np.full((64, 128), 2, np.uint8)).save(tmp_path / "fs_static" / "labels_masks" / "0.png")
    result = run_script(SCRIPT, model, f"data.root={tmp_path}", "--output", tmp_path / "out")
    assert result.returncode == 1 and "0.png has the value 2" in result.stderr
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert not list(tmp_path.rglob("*.safetensors")), "the network had run before labels were looked at"


def test_a_benchmark_that_cannot_be_used_ends_no_other_and_all_of_its_faults_are_told(
    call_script, model, toys, tmp_path
):
    shutil.copytree(toys.folder, tmp_path / "toy_anomalies")
    for name in ("FS_LostFound_full", "fs_static"):
        shutil.copytree(toys.folder, tmp_path / name)
        for label in sorted((tmp_path / name / "labels_masks").iterdir())[:2]:
            Image.fromarray(np.full((80, 200), 7, np.uint8)).save(label)
    words = [f"data.root={tmp_path}", "--output", tmp_path / "out", "--no_components", "--pictures", "0"]
    code, error = call_script(SCRIPT, model, *words)
    assert code == 1 and (tmp_path / "out" / "toy_anomalies.json").is_file()
    told = error.rpartition("error: ")[2]
    assert all(f"{name}: " in told for name in ("fs_lost_and_found", "fs_static"))
    assert told.count("toy_0000") == 2 and told.count("1 more cannot be used: toy_0001") == 2


def test_all_benchmarks_that_are_not_there_are_named_at_once(call_script, model, tmp_path):
    code, error = call_script(SCRIPT, model, "data=[fs_static,road_anomaly]", f"data.root={tmp_path}")
    assert code == 1 and "FS Static needs" in error and "Road Anomaly needs" in error


def test_the_precision_of_a_run_that_no_logits_are_computed_in_is_one_sentence(model, tmp_path):
    shutil.copytree(model, tmp_path / "model")
    file = tmp_path / "model" / "eomt_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"precision": "bf16-true"}))
    result = run_script(SCRIPT, tmp_path / "model", *SETTINGS, f"data.root={tmp_path}/toys")
    assert result.returncode == 1
    assert result.stderr.startswith("error: the run's precision was bf16-true: choose --precision from 32-true")


def test_several_benchmarks_may_be_named_and_numbers_be_written_in_any_way(toys):
    root = toys.folder.parents[1]
    settings = parse(
        [
            "data=[toy_anomalies,toy_anomalies]",
            f"data.root={root}",
            "data.number=4",
            "data.size=[80,200]",
            "temperatures=1e-1",
        ]
    )
    assert settings["temperatures"] == [0.1] and parse(["data.root=2024"])["data.root"] == "2024"
    assert [dataset.folder for dataset in open_datasets(settings)[0]] == [toys.folder]
    ((found,), _) = open_datasets(parse(["data=null", f"data.root={toys.folder.parent}"]))
    assert found.folder == toys.folder, "toys that lie there are taken, none are drawn"


def test_one_temperature_is_drawn_and_it_is_not_the_best_of_the_labels(monkeypatch, module, toys, cache, tmp_path):
    titles = []
    monkeypatch.setattr(
        "eomt.reporting.anomaly_report.anomaly_picture",
        lambda rows, maps, path, *_: path.touch() or titles.extend(m.title for m in maps),
    )
    for temperatures in ([0.5, 1.0, 2.0], [0.5, 2.0]):
        results = evaluate(cache, toys, variants(["msp", "rba"], temperatures), quietly, with_components=False)
        for result, auprc in zip(results, (0.2, 0.1, 0.9), strict=False):
            object.__setattr__(result.pixels, "auprc", auprc)
        draw(tmp_path, toys, cache, results, 1, module.hparams.num_classes)
    assert set(titles[:2]) == {"msp, T = 1", "rba"} and set(titles[2:]) == {"msp, T = 0.5", "rba"}


def test_help_has_examples():
    result = run_script(SCRIPT, "--help")
    assert result.returncode == 0 and result.stdout.count("python scripts/evaluate_anomaly.py ") >= 4
    assert max(map(len, result.stdout.splitlines())) <= 120
