import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image

from eomt.anomaly.cut_paste import CutPaste, Paste
from eomt.anomaly.cutouts import KNOWN_IN_COCO, CocoCutOuts, FolderCutOuts, ToyCutOuts
from eomt.data.camvid import CAMVID
from eomt.data.cityscapes import CITYSCAPES, cityscapes
from eomt.data.datamodule import SegmentationDataModule
from eomt.data.dataset import SegmentationDataset
from eomt.data.sources import Sample, Source
from eomt.data.statistics import class_weights, count_classes
from eomt.data.toy_streets import write_toy_streets
from eomt.data.transforms import draw_crop, nearest
from eomt.indices import IGNORE, OUTLIER, OUTLIER_COLOR
from eomt.settings.config_check import check_config

ROAD, SIDEWALK, SKY = (CITYSCAPES.names.index(name) for name in ("road", "sidewalk", "sky"))
HEIGHT, WIDTH, HORIZON = 100, 160, 40


class Plain:
    """One rectangle of one colour, which fills its picture."""

    def __init__(self, color=(255, 255, 255), size=(20, 10)):
        self.pixels = np.full((*size, 4), (*color, 255), np.uint8)

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return self.pixels

    def name(self, index):
        return "plain"


@pytest.fixture
def scene():
    """Sky above the horizon, below it a road between sidewalks; a gray picture with noise."""
    labels = torch.full((HEIGHT, WIDTH), SKY, dtype=torch.uint8)
    labels[HORIZON:] = SIDEWALK
    labels[HORIZON:, 40:120] = ROAD
    image = torch.randint(80, 120, (HEIGHT, WIDTH, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return image.permute(2, 0, 1), labels


def paster(cutouts=None, classes=CITYSCAPES, **settings):
    return CutPaste(cutouts or Plain(), **{"probability": 1.0} | settings).for_classes(classes)


def drawn(cut_paste, labels, times=60):
    """What is drawn for many seeds."""
    pastes = []
    for seed in range(times):
        torch.manual_seed(seed)
        pastes += cut_paste.draw(labels)
    return pastes


def pasted(cut_paste, scene, row=90, column=80, size=40, mirrored=False):
    return cut_paste.apply(*scene, [Paste(0, "plain", size, row, column, mirrored)])


# --- pasting ------------------------------------------------------------------------------------------------------


def test_a_hard_object_changes_its_own_pixels_and_labels_and_nothing_else(scene):
    image, labels = pasted(paster(edge="hard"), scene)
    inside = labels == OUTLIER
    rows, columns = (inside.any(side).nonzero().flatten().tolist() for side in (1, 0))
    assert (rows[0], rows[-1], columns[0], columns[-1]) == (51, 90, 70, 89) and inside.sum() == 40 * 20
    assert (image[:, inside] == 255).all()
    assert torch.equal(image[:, ~inside], scene[0][:, ~inside]) and torch.equal(labels[~inside], scene[1][~inside])


def test_the_given_scene_stays_as_it_was(scene):
    before = scene[0].clone(), scene[1].clone()
    pasted(paster(), scene)
    assert torch.equal(scene[0], before[0]) and torch.equal(scene[1], before[1])


@pytest.mark.parametrize("value", [0, 255])
def test_a_feathered_edge_mixes_object_and_scene_and_brings_no_third_colour(scene, value):
    image = torch.full_like(scene[0], value)
    same, labels = pasted(paster(Plain((value, value, value))), (image, scene[1]))
    assert (same.int() - value).abs().max() <= 2  # an object of the scene's own colour does not show
    other, _ = pasted(paster(Plain((255 - value,) * 3)), (image, scene[1]))
    row = other[0, 70].float()
    step = (row[1:] - row[:-1]).abs().max()
    assert 60 < step < 180  # from 0 to 255 over some pixels
    assert torch.equal(labels == OUTLIER, pasted(paster(edge="hard"), scene)[1] == OUTLIER)


def test_a_feathered_edge_is_soft_on_every_side(scene):
    image = torch.zeros_like(scene[0])
    mixed, labels = pasted(paster(), (image, scene[1]))
    inside = labels == OUTLIER
    for row, column in ((50, 80), (91, 80), (70, 69), (70, 90)):
        assert not inside[row, column] and 20 < mixed[0, row, column] < 128


def test_colours_are_matched_half_way_to_the_street_if_asked(scene):
    red = Plain((200, 40, 40))
    scene[0][:, : HEIGHT // 2] = 255  # a bright sky
    plain, labels = pasted(paster(red, edge="hard"), scene)
    matched, _ = pasted(paster(red, edge="hard", match_color=True), scene)
    inside = labels == OUTLIER
    around = scene[0][:, HEIGHT // 2 :].float().mean((1, 2))
    assert plain[:, inside].float().mean(1).tolist() == [200, 40, 40]
    assert torch.allclose(matched[:, inside].float().mean(1), (around + torch.tensor([200.0, 40, 40])) / 2, atol=1)


def test_matching_does_not_blow_up_the_grain_of_a_plain_object(scene):
    rng = np.random.default_rng(0)
    black_and_white = 255 * (scene[0] % 2)
    grainy = Plain()
    grainy.pixels[..., :3] = rng.integers(126, 130, (20, 10, 1))
    matched, labels = pasted(paster(grainy, edge="hard", match_color=True), (black_and_white, scene[1]))
    assert matched[:, labels == OUTLIER].float().std() < 8


def test_a_mirrored_object_is_mirrored(scene):
    two_halves = Plain()
    two_halves.pixels[:, :5, :3] = 0
    left, labels = pasted(paster(two_halves, edge="hard"), scene)
    right, _ = pasted(paster(two_halves, edge="hard"), scene, mirrored=True)
    columns = (labels == OUTLIER)[70].nonzero().flatten()
    assert torch.equal(left[:, 70, columns], right[:, 70, columns.flip(0)])
    assert left[0, 70, columns[1]] < 50 < 200 < left[0, 70, columns[-2]]


@pytest.mark.parametrize(
    ("row", "column", "pixels"), [(0, 0, 10), (0, 159, 11), (99, 0, 400), (99, 159, 440), (99, 80, 800)]
)
def test_what_lies_outside_of_the_image_is_cut_off(scene, row, column, pixels):
    _, labels = pasted(paster(), scene, row, column)
    inside = labels == OUTLIER
    assert inside[row, column] and inside.sum() == pixels and labels.shape == (HEIGHT, WIDTH)


def test_of_two_objects_the_nearer_one_is_on_top(scene):
    cut_paste = paster(objects=[3, 3], size=[0.4, 0.5])
    for seed in range(10):
        torch.manual_seed(seed)
        rows = [paste.row for paste in cut_paste.draw(scene[1])]
        assert rows == sorted(rows)
    first, last = (Paste(0, "plain", 40, row, 80, False) for row in (80, 90))
    one = paster(edge="hard")
    alone = one.apply(*scene, [last])[0]
    both = one.apply(*scene, [first, last])[0]
    assert torch.equal(alone[:, 51:91, 70:90], both[:, 51:91, 70:90])


# --- what, how large, where ---------------------------------------------------------------------------------------


def test_a_seed_fixes_the_view_and_another_one_gives_another(scene):
    def view(seed):
        np.random.seed()  # no other generator counts
        torch.manual_seed(seed)
        return paster(ToyCutOuts(), probability=0.5)(*scene)

    for seed in range(20):
        assert all(torch.equal(first, second) for first, second in zip(view(seed), view(seed), strict=True))
    assert len({view(seed)[0].sum().item() for seed in range(20)}) > 4


def test_the_probability_is_that_of_an_image_to_get_any(scene):
    def share(probability):
        cut_paste = paster(probability=probability)
        return sum(bool(drawn_once(cut_paste, scene[1], seed)) for seed in range(400)) / 400

    assert share(1.0) == 1
    assert abs(share(0.3) - 0.3) < 4 * (0.3 * 0.7 / 400) ** 0.5


def drawn_once(cut_paste, labels, seed):
    torch.manual_seed(seed)
    return cut_paste.draw(labels)


def test_every_number_of_objects_occurs_and_no_other(scene):
    cut_paste = paster(objects=[2, 4])
    assert {len(drawn_once(cut_paste, scene[1], seed)) for seed in range(60)} == {2, 3, 4}


def test_all_cutouts_occur_mirrored_and_not(scene):
    pastes = drawn(paster(ToyCutOuts(number=3)), scene[1])
    assert {(paste.cutout, paste.mirrored) for paste in pastes} == {(k, m) for k in range(3) for m in (True, False)}


def test_objects_stand_on_the_road_or_anywhere(scene):
    labels = scene[1]
    on_road = {labels[paste.row, paste.column].item() for paste in drawn(paster(), labels)}
    anywhere = {
        labels[paste.row, paste.column].item() for paste in drawn(paster(where="anywhere", scale="uniform"), labels)
    }
    assert on_road == {ROAD} and anywhere == {ROAD, SIDEWALK, SKY}


def test_an_object_shrinks_towards_the_horizon_in_perspective_and_not_otherwise(scene):
    pastes = drawn(paster(size=[0.5, 0.5]), scene[1])
    assert len({paste.row for paste in pastes}) > 20
    for paste in pastes:
        assert paste.size == round(0.5 * HEIGHT * (paste.row - HORIZON) / (HEIGHT - 1 - HORIZON))
    assert min(paste.size for paste in pastes) >= 4
    assert {paste.size for paste in drawn(paster(size=[0.5, 0.5], scale="uniform"), scene[1])} == {50}


def test_a_car_that_hides_the_far_road_does_not_move_the_horizon(scene):
    labels = scene[1].clone()
    labels[:70] = CITYSCAPES.names.index("car")
    pastes = drawn(paster(size=[0.5, 0.5]), labels)
    assert {paste.size for paste in pastes} == {round(50 * (paste.row - 45) / 54) for paste in pastes}


def test_the_smallest_object_fits_above_where_it_stands(scene):
    for scale in ("uniform", "perspective"):
        pastes = drawn(paster(where="anywhere", scale=scale, size=[0.3, 0.3]), scene[1])
        assert pastes and all(paste.row + 1 >= paste.size >= 4 for paste in pastes)


def test_the_longer_side_has_the_size_whatever_the_shape(scene):
    for size in ((40, 8), (8, 40)):
        _, labels = pasted(paster(Plain(size=size)), scene, size=30)
        inside = labels == OUTLIER
        assert sorted((inside.any(1).sum().item(), inside.any(0).sum().item())) == [6, 30]


def test_an_image_without_road_stays_as_it_is(scene):
    labels = torch.full_like(scene[1], SKY)
    assert not drawn(paster(), labels) and drawn(paster(where="anywhere"), labels)


def test_the_road_is_found_by_its_name_in_every_data_set(scene):
    cut_paste = CutPaste(Plain())
    assert cut_paste.for_classes(CITYSCAPES).road == 0 and cut_paste.for_classes(CAMVID).road == 3
    assert replace(cut_paste, road=2).for_classes(CAMVID).road == 2
    with pytest.raises(ValueError, match=r"cut_paste\.road 'street'.*no such class.*where=anywhere"):
        replace(cut_paste, road="street").for_classes(CITYSCAPES)
    replace(cut_paste, road="street", where="anywhere").for_classes(CITYSCAPES)


@pytest.mark.parametrize(
    "settings",
    [
        {"probability": 1.1},
        {"objects": [0, 2]},
        {"objects": [3, 2]},
        {"size": [0.0, 0.5]},
        {"size": [0.5, 1.5]},
        {"scale": "log"},
        {"where": "sky"},
        {"edge": "sharp"},
    ],
)
def test_impossible_settings_are_refused_by_name(settings):
    with pytest.raises(ValueError, match=rf"data\.cut_paste\.{next(iter(settings))} "):
        CutPaste(Plain(), **settings)


# --- in training --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return write_toy_streets(tmp_path_factory.mktemp("toy"), "clear", 6, 2, (64, 128), 0)


def opened(root, cut_paste=None, **options):
    return cityscapes(str(root), img_size=[64, 128], batch_size=2, num_workers=0, cut_paste=cut_paste, **options)


def test_training_views_show_outliers_and_validation_images_none(toy):
    data = opened(toy, CutPaste(ToyCutOuts(), probability=1.0))
    outliers = [(data.train_set[k, k][1] == OUTLIER).sum().item() for k in range(6)]
    assert sum(count > 0 for count in outliers) >= 3
    assert not any((labels == OUTLIER).any() for _, labels in data.val_set)
    images, labels = next(iter(data.train_dataloader()))
    assert images.dtype == labels.dtype == torch.uint8 and images.shape == (2, 3, 64, 128)


def test_pasting_leaves_crops_and_colours_as_they_are(toy):
    plain, pasting = opened(toy), opened(toy, CutPaste(ToyCutOuts(), probability=1.0, edge="hard"))
    for k in range(6):
        (image, labels), (changed, with_outliers) = plain.train_set[k, k], pasting.train_set[k, k]
        kept = with_outliers != OUTLIER
        assert torch.equal(labels[kept], with_outliers[kept])
        distance = (image[:, kept].int() - changed[:, kept].int()).abs()
        assert (distance <= 4).float().mean() > 0.95  # contrast depends on the mean, edges on what is beside them


def test_without_cut_paste_training_views_are_what_they_were(toy):
    data = opened(toy)
    assert type(data.train_set.transform).__name__ == "TrainTransform" and "cut_paste" not in data.fingerprint()


def test_outliers_are_no_class_in_counts_and_weights(toy, tmp_path):
    plain, paste = (opened(toy, cut, class_weights="inverse") for cut in (None, CutPaste(ToyCutOuts())))
    assert plain.class_weights == paste.class_weights
    dataset = labelled(tmp_path, [[0, 0, OUTLIER, OUTLIER, IGNORE, 1]])
    counts = count_classes(dataset)
    assert counts.pixels.tolist() == [2, 1] + [0] * 17
    assert len(class_weights(counts, "inverse")) == 19


def labelled(folder, values):
    """A data set of one image, with train ids as they are stored."""
    labels = np.array(values, dtype=np.uint8)
    for part, name, pixels in (
        ("leftImg8bit", "leftImg8bit", np.zeros((*labels.shape, 3), np.uint8)),
        ("gtFine", "gtFine_labelTrainIds", labels),
    ):
        for split in ("train", "val"):
            path = folder / part / split / "a" / f"a_000000_000000_{name}.png"
            path.parent.mkdir(parents=True)
            Image.fromarray(pixels).save(path)
    return cityscapes(str(folder), img_size=[8, 8], batch_size=1, num_workers=0).train_set


def test_stored_train_ids_may_hold_outliers_and_label_ids_may_not(tmp_path):
    dataset = labelled(tmp_path, [[0, OUTLIER, IGNORE, 18]])
    assert dataset.labels(0).tolist() == [[0, 254, 255, 18]]
    label = dataset.samples[0].label.path
    ids = label.replace("labelTrainIds", "labelIds")
    Image.fromarray(np.array([[7, OUTLIER]], np.uint8)).save(ids)
    sample = Sample("a", dataset.samples[0].image, Source(ids))
    from eomt.data.cityscapes import _DECODERS

    with pytest.raises(ValueError, match="has the value 254, which no class lists"):
        SegmentationDataset([sample], CITYSCAPES, _DECODERS["labelIds"]).labels(0)


def test_outliers_are_drawn_in_a_colour_that_no_class_has():
    assert CITYSCAPES.colorize(torch.tensor([[OUTLIER, IGNORE]], dtype=torch.uint8)).tolist() == [
        [list(OUTLIER_COLOR), [0, 0, 0]]
    ]
    assert OUTLIER_COLOR not in (*CITYSCAPES.colors, *CAMVID.colors)


def test_a_crop_shows_a_class_and_not_outliers_alone():
    labels = torch.full((200, 200), OUTLIER, dtype=torch.uint8)
    labels[3, 5] = 1
    for seed in range(5):
        torch.manual_seed(seed)
        *_, crop = draw_crop(labels, nearest(200, 200), nearest(200, 200), (16, 16))
        assert (crop == 1).any()


def test_the_transforms_tell_everything_that_a_cache_of_views_depends_on(toy, tmp_path):
    def key(cut_paste, **options):
        return repr(opened(toy, cut_paste, **options).train_set.transform)

    save(tmp_path / "a.png")
    base = key(CutPaste(ToyCutOuts()))
    assert base == key(CutPaste(ToyCutOuts())) and " at 0x" not in base
    others = [
        key(CutPaste(ToyCutOuts(), probability=0.6)),
        key(CutPaste(ToyCutOuts(seed=1))),
        key(CutPaste(ToyCutOuts()), flip=False),
        key(CutPaste(FolderCutOuts(tmp_path))),
    ]
    save(tmp_path / "b.png")
    others.append(key(CutPaste(FolderCutOuts(tmp_path))))
    assert len({base, *others}) == 6 and not any(" at 0x" in other for other in others)


def test_what_is_no_cut_paste_is_refused_with_the_way_to_choose_one(toy):
    for wrong in ("toy", {}):
        with pytest.raises(ValueError, match=r"choose cut-outs with data/cut_paste=toy, coco or folder"):
            opened(toy, wrong)


# --- configuration ------------------------------------------------------------------------------------------------


def composed(*overrides):
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return compose("cityscapes", ["output_dir=run", "name=test", *overrides]).data


def test_cut_paste_is_chosen_by_name_and_off_unless_chosen(toy):
    assert composed("data.root=x").cut_paste is None
    chosen = (f"data.root={toy}", "data/cut_paste=toy", "data.cut_paste.probability=0.25", "model.img_size=[64,64]")
    config = composed(*chosen, "data.batch_size=2")
    check_config({"data": OmegaConf.to_container(config, resolve=True)})
    data = instantiate(config, _convert_="all")
    assert isinstance(data, SegmentationDataModule)
    assert data.cut_paste.probability == 0.25 and data.cut_paste.cutouts == ToyCutOuts()
    assert composed(*chosen, "data.cut_paste=null").cut_paste is None


@pytest.mark.parametrize("choice", ["toy", "coco", "folder"])
def test_yaml_and_signature_agree_on_every_default(choice):
    config = OmegaConf.to_container(composed("data.root=x", f"data/cut_paste={choice}").cut_paste)
    del config["_target_"], config["cutouts"]
    default = vars(CutPaste(Plain()))
    assert config == {
        key: list(value) if isinstance(value, tuple) else value for key, value in default.items() if key != "cutouts"
    }


def test_the_yaml_leaves_out_what_the_filter_does():
    assert list(composed("data/cut_paste=coco").cut_paste.cutouts.exclude) == list(KNOWN_IN_COCO)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("+data.cut_paste.probabilty=1", r"data\.cut_paste\.probabilty is unknown; did you mean probability"),
        ("data.cut_paste.probability=often", r"data\.cut_paste\.probability 'often': should be a valid number"),
        ("data.cut_paste.edge=soft", r"data\.cut_paste\.edge 'soft': should be 'hard' or 'feathered'"),
        ("+data.cut_paste.cutouts.numbr=3", r"data\.cut_paste\.cutouts\.numbr is unknown; did you mean number"),
        ("data.cut_paste.cutouts=many", r"data\.cut_paste\.cutouts 'many': should be an instance of CutOuts"),
    ],
)
def test_unknown_keys_and_wrong_values_are_named(override, sentence):
    config = composed("data.root=x", "data/cut_paste=toy", override)
    with pytest.raises(ValueError, match=sentence):
        check_config({"data": OmegaConf.to_container(config, resolve=True)})


# --- cut-outs -----------------------------------------------------------------------------------------------------


def test_drawn_objects_differ_and_repeat(tmp_path):
    one, two = ToyCutOuts(), ToyCutOuts(seed=1)
    assert np.array_equal(one[5], ToyCutOuts()[5])
    assert not any(np.array_equal(one[k], other) for k in range(5) for other in (one[k + 1], two[k]))
    for k in range(30):
        alpha = one[k][..., 3]
        assert one[k].dtype == np.uint8 and alpha.any(0).all() and alpha.any(1).all() and alpha.max() == 255


def test_no_drawn_object_is_one_of_the_strangers():
    from eomt.toys.objects import CUTOUTS, STRANGERS

    assert not {draw.__name__ for draw in CUTOUTS} & {draw.__name__ for draw in STRANGERS}


def save(path, mode="RGBA", alpha=(2, 3, 6, 8)):
    picture = Image.new(mode, (10, 12), (200, 10, 10, 0)[: len(mode)])
    if mode == "RGBA":
        picture.paste((200, 10, 10, 255), alpha)
    picture.save(path)


def test_a_folder_gives_its_pictures_without_their_transparent_border(tmp_path):
    (tmp_path / "inner").mkdir()
    save(tmp_path / "inner" / "b.png")
    save(tmp_path / "a.webp")
    (tmp_path / "notes.txt").write_text("no picture")
    cutouts = FolderCutOuts(str(tmp_path))
    assert [cutouts.name(k) for k in range(len(cutouts))] == ["a.webp", "inner/b.png"]
    assert cutouts[1].shape == (5, 4, 4) and (cutouts[1] == (200, 10, 10, 255)).all()


def test_a_palette_with_transparency_is_a_cutout_too(tmp_path):
    picture = Image.new("P", (6, 6), 0)
    picture.putpalette([0, 0, 0, 250, 250, 250])
    picture.paste(1, (1, 1, 4, 5))
    picture.save(tmp_path / "p.png", transparency=0)
    assert FolderCutOuts(str(tmp_path))[0].shape == (4, 3, 4)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda folder: None, "has no PNG or WebP picture"),
        (lambda folder: save(folder / "a.png", "RGB"), r"a\.png has no alpha channel"),
        (lambda folder: (folder / "a.png").write_bytes(b"half"), r"a\.png cannot be decoded as a picture"),
        (lambda folder: save(folder / "a.png", alpha=(0, 0, 10, 12)), r"a\.png is opaque all over"),
        (lambda folder: save(folder / "a.png", alpha=(0, 0, 0, 0)), r"a\.png is transparent all over"),
    ],
)
def test_a_folder_that_cannot_be_pasted_is_refused_by_the_file(tmp_path, make, sentence):
    make(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=sentence):
        FolderCutOuts(str(tmp_path))[0]


SQUARE = [[10.0, 20.0, 29.0, 20.0, 29.0, 39.0, 10.0, 39.0]]
NAMES = {1: "person", 3: "car", 18: "dog", 62: "chair"}


def instance(image, category, number, box=(10, 20, 20, 20), segmentation=None, crowd=0):
    return {
        "id": number,
        "image_id": image,
        "category_id": category,
        "bbox": list(box),
        "area": box[2] * box[3],
        "segmentation": SQUARE if segmentation is None else segmentation,
        "iscrowd": crowd,
    }


@pytest.fixture
def coco(tmp_path):
    """Five images: a dog; a dog beside a car; a chair beside a crowd of people; a chair by run lengths; nothing."""
    (tmp_path / "images").mkdir()
    for k in range(1, 6):
        pixels = np.full((60, 80, 3), 10 * k, np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{k}.png")
    runs = np.zeros((60, 80), int)
    runs[5:25, 40:44] = 1
    changes = np.flatnonzero(np.diff(runs.T.flatten(), prepend=0))
    counts = np.diff([0, *changes, 4800]).tolist()
    content = {
        "images": [{"id": k, "file_name": f"{k}.png", "width": 80, "height": 60} for k in range(1, 6)],
        "categories": [{"id": number, "name": name} for number, name in NAMES.items()],
        "annotations": [
            instance(1, 18, 11),
            instance(2, 18, 21),
            instance(2, 3, 22),
            instance(3, 62, 31),
            instance(3, 1, 32, crowd=1),
            instance(4, 62, 41, (40, 5, 4, 20), {"size": [60, 80], "counts": counts}),
            instance(5, 18, 51, crowd=1),
            instance(5, 18, 52, (10, 20, 5, 5)),
            instance(5, 18, 53, (0, 20, 20, 20)),
            instance(5, 18, 54, (10, 40, 20, 20)),
        ],
    }
    path = tmp_path / "instances.json"

    def read(change=lambda content: None, exclude=("person", "car"), **options):
        change(content)
        path.write_text(json.dumps(content))
        return CocoCutOuts(str(path), str(tmp_path / "images"), list(exclude), **{"min_area": 50} | options)

    return read


def test_an_image_that_shows_a_known_category_is_left_out_as_a_whole(coco):
    cutouts = coco()
    assert [cutouts.name(k) for k in range(len(cutouts))] == ["1.png dog 11", "4.png chair 41"]
    assert len(coco(exclude=["person"])) == 4 and len(coco(exclude=["car"])) == 3
    assert len(coco(exclude=[])) == 5  # the car, too


def test_polygons_and_run_lengths_are_cut_out(coco):
    cutouts = coco()
    square, bar = cutouts[0], cutouts[1]
    assert square.shape == (20, 20, 4) and (square == (10, 10, 10, 255)).all()
    assert bar.shape == (20, 4, 4) and (bar == (40, 40, 40, 255)).all()


def test_small_instances_are_left_out(coco):
    assert len(coco(min_area=100)) == 1 and len(coco(min_area=20)) == 3


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda content: content.pop("annotations"), r"instances\.json is no file of COCO annotations"),
        (lambda content: content["annotations"].clear(), "no whole instance of 50 pixels or more is left"),
        (
            lambda content: content["images"][0].update(file_name="9.png"),
            r"1 of 2 images are not in .* first is 9\.png",
        ),
        (lambda content: content["images"][0].update(width=90), r"1\.png has \(80, 60\).*annotated at \(90, 60\)"),
        (lambda content: content["categories"].pop(1), "exclude has 'car'"),
        (lambda content: content["annotations"][5]["segmentation"].update(counts="abc"), "run lengths as text"),
        (lambda content: content["annotations"][5]["segmentation"].update(counts=[5, 5]), "add up to 10"),
    ],
)
def test_annotations_that_do_not_fit_are_refused(coco, change, sentence):
    with pytest.raises((ValueError, FileNotFoundError), match=sentence):
        coco(change)[0]


def test_a_category_to_exclude_must_exist(coco):
    with pytest.raises(ValueError, match="exclude has 'human', which is no category"):
        coco(exclude=["human"])
