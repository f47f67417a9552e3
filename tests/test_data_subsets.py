"""Fewer training images, and some of them held out: nested, seeded, and sequences stay together."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from eomt.data.camvid import camvid as camvid_data
from eomt.data.sources import Sample, Source
from eomt.data.subsets import choose_images, hold_out


def samples(*sequences):
    return [Sample(f"{k:04d}", Source(f"{k}.png"), Source(f"{k}m.png"), name) for k, name in enumerate(sequences)]


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 60), st.data(), st.integers(0, 5))
def test_fewer_images_of_a_seed_are_a_part_of_more_and_keep_their_order(total, data, seed):
    all_of_them = samples(*[None] * total)
    more = data.draw(st.integers(1, total))
    fewer = data.draw(st.integers(1, more))
    chosen = choose_images(all_of_them, more, seed)
    assert len(chosen) == more and sorted(chosen, key=lambda s: s.name) == chosen
    assert set(choose_images(all_of_them, fewer, seed)) <= set(chosen)
    assert choose_images(all_of_them, total, seed) == all_of_them


def test_another_seed_chooses_other_images():
    assert len({tuple(choose_images(samples(*[None] * 40), 10, seed)) for seed in range(5)}) == 5


@pytest.mark.parametrize("count", [0, -1, 5])
def test_more_images_than_there_are_are_refused(count):
    with pytest.raises(ValueError, match=f"data.train_images must lie between 1 and 4.*got {count}"):
        choose_images(samples(*[None] * 4), count, 0)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from("abcdefg"), min_size=2, max_size=80), st.floats(0.01, 0.99), st.integers(0, 5))
def test_a_sequence_stands_on_one_side_and_neither_side_is_empty(names, share, seed):
    train, held = hold_out(samples(*names), share, seed)
    assert train and held and len(train) + len(held) == len(names)
    if len(set(names)) > 1:
        assert not {s.sequence for s in train} & {s.sequence for s in held}
    else:
        assert held == samples(*names)[-len(held) :]
    assert hold_out(samples(*names), share, seed) == (train, held)


@given(st.integers(2, 50), st.floats(0.01, 0.99), st.integers(0, 5))
def test_without_sequences_the_share_is_exact(total, share, seed):
    _, held = hold_out(samples(*[None] * total), share, seed)
    assert len(held) == min(total - 1, max(1, round(share * total)))


def test_held_out_sequences_have_about_the_share():
    names = [name for name in "abcdefghijklmnopqrst" for _ in range(5)]
    for seed in range(10):
        held = hold_out(samples(*names), 0.2, seed)[1]
        assert Counter(sample.sequence for sample in held).total() == 20


@pytest.mark.parametrize("share", [0, 1, -0.1, 1.5])
def test_an_impossible_share_is_refused(share):
    with pytest.raises(ValueError, match=r"data\.hold_out must lie between 0 and 1"):
        hold_out(samples("a", "b"), share, 0)


def test_one_image_cannot_be_split():
    with pytest.raises(ValueError, match="at least 2 training images, there is 1"):
        hold_out(samples("a"), 0.5, 0)


@pytest.fixture
def camvid(tmp_path):
    """Six frames of two sequences to train on, two to validate on."""
    names = {"train": ["a_1", "a_2", "a_3", "a_4", "b_1", "b_2"], "val": ["c_1", "c_2"]}
    for split, stems in names.items():
        for stem in stems:
            for folder, mode in ((split, "RGB"), (f"{split}annot", "L")):
                (tmp_path / folder).mkdir(exist_ok=True)
                Image.new(mode, (64, 64)).save(tmp_path / folder / f"{stem}.png")
    return lambda **options: camvid_data(str(tmp_path), img_size=[64, 64], batch_size=1, num_workers=0, **options)


def test_settings_are_chosen_on_whole_sequences_of_the_training_images(camvid):
    data = camvid(hold_out=0.3)
    assert data.train_set.names == ["a_1", "a_2", "a_3", "a_4"] and data.val_set.names == ["b_1", "b_2"]


def test_fewer_training_images_leave_the_validation_images_as_they_are(camvid):
    data = camvid(train_images=3, subset_seed=1)
    assert len(data.train_set) == 3 and data.val_set.names == ["c_1", "c_2"]
    assert set(data.train_set.names) <= set(camvid(train_images=5, subset_seed=1).train_set.names)
    assert data.fingerprint()["train"] != camvid().fingerprint()["train"]


def test_what_is_held_out_of_a_subset_is_a_part_of_it(camvid):
    data = camvid(train_images=4, hold_out=0.5)
    together = {*data.train_set.names, *data.val_set.names}
    assert together == set(camvid(train_images=4).train_set.names)
