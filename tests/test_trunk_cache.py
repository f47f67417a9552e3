"""Training from the output of frozen blocks: the same loss, seeded views, and what it refuses."""

import copy
import pickle
import threading
import time

import lightning
import pytest
import torch
from conftest import TINY
from filelock import FileLock

from eomt.data.cityscapes import TRAIN_ID_OF_ID
from eomt.data.sources import IndexDecoder
from eomt.data.toy_streets import toy_streets
from eomt.indices import IGNORE
from eomt.training.mask_classification_semantic import MaskClassificationSemantic
from eomt.training.trunk_cache import CachedViews, TrunkCache, check_space, open_tensor

LAST = {"use_lora": True, "lora_blocks": 1, "lora_dropout": 0.0, "masked_attn_enabled": False, "lr": 1e-3}


def build(**settings):
    torch.manual_seed(0)
    return MaskClassificationSemantic(**{**TINY, **LAST, **settings})


@pytest.fixture
def data(toy_cache):
    def streets():
        return toy_streets(
            str(toy_cache), num_train=8, num_val=3, size=(64, 128), img_size=[64, 128], batch_size=2, num_workers=0
        )

    return streets


@pytest.fixture
def cache(tmp_path):
    return TrunkCache(views=3, folder=str(tmp_path / "cache"))


def fit(module, data, callbacks=(), epochs=2, seed=5, precision="32-true"):
    """The losses, and the batches that gave them."""
    losses, batches = [], []

    class Keep(lightning.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            losses.append(outputs["loss"].item())
            batches.append(batch)

    lightning.seed_everything(seed, verbose=False)
    lightning.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        precision=precision,
        callbacks=[*callbacks, Keep()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
    ).fit(module, data)
    return torch.tensor(losses), batches


def caches(tmp_path):
    return [path for path in (tmp_path / "cache").iterdir() if not path.name.startswith(".")]


class SameViews(torch.utils.data.Dataset):
    """The views behind a cache, as pixels."""

    def __init__(self, cache):
        self.images, self.views = cache.images, cache.views
        rows = len(cache) * cache.views
        self.seeds = torch.randint(2**62, (rows,), generator=torch.Generator().manual_seed(5)).tolist()
        self.classes, self.samples, self.labels = cache.classes, cache.samples, cache.labels
        self.fingerprint = cache.fingerprint

    def __len__(self):
        return len(self.images)

    def __getitem__(self, item):
        index, seed = item
        return self.images[index, self.seeds[index * self.views + seed % self.views]]


@pytest.mark.parametrize(
    ("name", "kwargs"), [("vit_tiny_patch16_224", {}), ("vit_small_patch16_dinov3", {"rope_rescale_coords": None})]
)
def test_the_loss_is_that_of_training_from_pixels_to_bf16_rounding(data, cache, name, kwargs):
    chosen = {"backbone_name": name, "backbone_kwargs": TINY["backbone_kwargs"] | kwargs}
    from_tokens, batches = fit(build(**chosen), data(), [cache])
    assert batches[0][0].dtype == torch.bfloat16
    pixels = data()
    pixels.train_set = SameViews(cache.cache)
    from_pixels, batches = fit(build(**chosen), pixels)
    assert batches[0][0].dtype == torch.uint8
    torch.testing.assert_close(from_tokens, from_pixels, rtol=5e-3, atol=0)
    assert len(from_tokens) == 8 and from_tokens.std() > 0


def test_views_are_seeded_and_the_cache_is_used_again(data, cache, tmp_path):
    losses, _ = fit(build(), data(), [cache])
    (folder,) = caches(tmp_path)
    written = (folder / "tokens").stat().st_mtime_ns
    again, _ = fit(build(), data(), [TrunkCache(3, str(tmp_path / "cache"))])
    assert torch.equal(losses, again) and (folder / "tokens").stat().st_mtime_ns == written
    fit(build(), data(), [TrunkCache(3, str(tmp_path / "cache"))], seed=6)
    fit(build(), data(), [TrunkCache(2, str(tmp_path / "cache"))])
    assert len(caches(tmp_path)) == 3


def test_other_weights_do_not_meet_an_old_cache(data, cache, tmp_path):
    fit(build(), data(), [cache])
    other = build()
    with torch.no_grad():
        other.network.encoder.backbone.blocks[0].mlp.fc1.weight[0, 0] += 1
    fit(other, data(), [TrunkCache(3, str(tmp_path / "cache"))])
    assert len(caches(tmp_path)) == 2


def test_the_same_images_in_another_order_do_not_meet_an_old_cache(data, cache, tmp_path):
    fit(build(), data(), [cache])
    turned = data()
    turned.train_set.samples = turned.train_set.samples[::-1]
    fit(build(), turned, [TrunkCache(3, str(tmp_path / "cache"))])
    assert len(caches(tmp_path)) == 2


def test_other_labels_of_the_same_files_do_not_meet_an_old_cache(data, cache, tmp_path):
    fit(build(), data(), [cache])
    mended = data()
    mended.train_set.decode_labels = IndexDecoder(TRAIN_ID_OF_ID | {7: IGNORE}, "")  # no road any more
    fit(build(), mended, [TrunkCache(3, str(tmp_path / "cache"))])
    assert len(caches(tmp_path)) == 2


def test_another_network_with_the_same_weights_does_not_meet_an_old_cache(data, cache, tmp_path):
    fit(build(), data(), [cache])
    heads = {**TINY["backbone_kwargs"], "num_heads": 2 * TINY["backbone_kwargs"]["num_heads"]}
    fit(build(backbone_kwargs=heads), data(), [TrunkCache(3, str(tmp_path / "cache"))])
    assert len(caches(tmp_path)) == 2


def test_a_run_waits_for_another_that_fills_the_same_cache_and_uses_it(data, cache, tmp_path, monkeypatch):
    losses, _ = fit(build(), data(), [cache])
    folder, away = cache.cache.folder, tmp_path / "away"
    folder.rename(away)
    locked = threading.Event()

    def fill_slowly():
        with FileLock(folder.with_name(f".{folder.name}.lock")):
            locked.set()
            time.sleep(1)
            away.rename(folder)

    threading.Thread(target=fill_slowly).start()
    locked.wait()
    monkeypatch.setattr(CachedViews, "fill", lambda *_: pytest.fail("it was filled twice"))
    again, _ = fit(build(), data(), [TrunkCache(3, str(tmp_path / "cache"))])
    assert torch.equal(losses, again)


def test_a_frozen_base_in_bf16_fills_the_cache_that_float32_weights_do_under_autocast(data, cache, tmp_path):
    build(use_lora=False, lora_blocks="all").save_pretrained(tmp_path / "base")
    losses = []
    for dtype in ("float32", "bfloat16"):
        module = build(ckpt_path=str(tmp_path / "base"), base_dtype=dtype)
        losses.append(fit(module, data(), [TrunkCache(3, str(tmp_path / dtype))], precision="bf16-mixed")[0])
    assert torch.equal(*losses)


def test_an_interrupted_fill_leaves_nothing_behind(data, cache, tmp_path, monkeypatch):
    module = build()
    monkeypatch.setattr(module.network, "trunk", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fit(module, data(), [cache])
    assert not caches(tmp_path)
    losses, _ = fit(build(), data(), [TrunkCache(3, str(tmp_path / "cache"))])
    assert len(losses) == 8 and len(caches(tmp_path)) == 1
    assert not list((tmp_path / "cache").glob(".*/tokens"))  # of the interrupted run
    assert len(list((tmp_path / "cache").rglob("tokens"))) == 1


@pytest.mark.parametrize("damage", ["cut", "deleted", "longer", "unfinished", "empty"])
def test_a_cache_that_is_not_whole_is_said_and_filled_again(data, cache, tmp_path, caplog, damage):
    losses, _ = fit(build(), data(), [cache])
    (folder,) = caches(tmp_path)
    if damage == "cut":
        (folder / "tokens").write_bytes((folder / "tokens").read_bytes()[:100])
    elif damage == "deleted":
        (folder / "labels").unlink()
    elif damage == "longer":
        (folder / "labels").write_bytes((folder / "labels").read_bytes() + b"more")
    else:
        (folder / "finished.json").unlink()
    if damage == "empty":
        for file in folder.iterdir():
            file.unlink()
    again, _ = fit(build(), data(), [TrunkCache(3, str(tmp_path / "cache"))])
    assert torch.equal(losses, again)
    assert f"{folder} is not whole" in caplog.text


def test_a_whole_cache_is_not_said_to_be_broken(data, cache, tmp_path, caplog):
    for _ in range(2):
        fit(build(), data(), [TrunkCache(3, str(tmp_path / "cache"))])
    assert "is not whole" not in caplog.text


def test_reading_a_cache_neither_creates_nor_changes_a_file(data, cache, tmp_path):
    fit(build(), data(), [cache])
    (folder,) = caches(tmp_path)
    reader = copy.copy(cache.cache)
    reader.__dict__.pop("tensors", None)
    (folder / "labels").unlink()
    with pytest.raises(ValueError, match="labels is missing"):
        reader[0, 0]
    assert not (folder / "labels").exists()
    (folder / "tokens").write_bytes(b"short")
    with pytest.raises(ValueError, match="tokens has 5 bytes"):
        open_tensor(folder / "tokens", cache.cache.shapes["tokens"])
    assert (folder / "tokens").read_bytes() == b"short"


def test_a_fill_that_was_interrupted_midway_does_not_spoil_the_next_one_of_the_process(data, tmp_path, monkeypatch):
    expected, _ = fit(build(), data(), [TrunkCache(3, str(tmp_path / "elsewhere"))])
    module, calls = build(), []
    trunk = module.network.trunk

    def stops(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return trunk(*arguments)

    monkeypatch.setattr(module.network, "trunk", stops)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(module, data(), [TrunkCache(3, str(tmp_path / "cache"))])
    losses, _ = fit(build(), data(), [TrunkCache(3, str(tmp_path / "cache"))])
    assert torch.equal(losses, expected)
    (folder,) = caches(tmp_path)
    assert {"tokens", "labels"} <= {file.name for file in folder.iterdir()}


def test_a_loader_process_is_sent_the_place_of_the_views_and_not_their_content(data, cache):
    fit(build(), data(), [cache])
    view = cache.cache[3, 0]
    sent = pickle.dumps(cache.cache)
    assert len(sent) < cache.cache.bytes / 10
    assert all(torch.equal(a, b) for a, b in zip(pickle.loads(sent)[3, 0], view, strict=True))


def test_heads_alone_can_train_from_a_cache_too(data, cache):
    module = build(use_lora=False, freeze=["backbone"])
    fit(module, data(), [cache])
    assert module.cached_blocks == len(module.network.encoder.blocks) - module.network.num_blocks


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lora_blocks": "all"}, "blocks.0.attn.* trains"),
        ({"use_lora": False}, "trains, so that no block's output stays the same"),
        ({"masked_attn_enabled": True}, "masked_attn_enabled=false"),
        ({"backbone_kwargs": TINY["backbone_kwargs"] | {"drop_path_rate": 0.1}}, "drop_path_rate"),
    ],
)
def test_what_would_not_stay_the_same_is_refused(data, cache, settings, words):
    with pytest.raises(ValueError, match=words):
        fit(build(**settings), data(), [cache])


def test_a_full_disk_is_named_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="GiB are free: take fewer views"):
        check_space(2**60, tmp_path)
    with pytest.raises(ValueError, match="views 0"):
        TrunkCache(views=0)


def test_rotary_coordinates_that_are_rescaled_at_random_are_refused(data, cache):
    dinov3 = {"backbone_name": "vit_small_patch16_dinov3_qkvb"}
    with pytest.raises(ValueError, match=r"trunk_cache with rope_rescale_coords.*rope_rescale_coords: null"):
        fit(build(**dinov3), data(), [cache])
    fit(build(**dinov3, backbone_kwargs=TINY["backbone_kwargs"] | {"rope_rescale_coords": None}), data(), [cache], 1)
