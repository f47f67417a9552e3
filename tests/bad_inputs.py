"""A folder with one good thing of each kind that a command line reads, and the ways to spoil it."""

import importlib
import io
import json
import os
import pickle
import resource
import struct
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from eomt.data.toy_streets import write_toy_streets
from eomt.training.mask_classification_semantic import MaskClassificationSemantic

DATA = ["data=folder", "data.classes=data/classes.yaml", "data.images=data/images", "data.masks=data/masks"]
DATA += ["data.batch_size=1", "data.num_workers=0"]
NET = ["model=tiny", "model.img_size=[32,32]", "model.backbone_kwargs={embed_dim:32,depth:2,num_heads:2}"]
NET += ["model.num_q=5", "model.num_blocks=1", "model.num_points=32", "trainer.max_epochs=1"]
ALIASES = {
    "DATA": DATA,
    "NET": NET,
    "TRAIN": ["train_with_lora.py", *DATA, *NET, "output_dir=out"],
    "TOYS": ["data=toy_streets", "data.num_train=2", "data.num_val=1", "data.size=[32,64]"],
    "LORA": ["model.use_lora=true", "model.lora_rank=2"],
}
CLASSES = """\
classes:
  - {name: road, color: [128, 64, 128], ids: [0]}
  - {name: sky, color: [70, 130, 180], ids: [1]}
ignore_ids: [255]
"""
TINY = {"img_size": [32, 32], "num_classes": 2, "backbone_name": "vit_tiny_patch16_224", "pretrained": False}
TINY |= {"backbone_kwargs": {"embed_dim": 32, "depth": 2, "num_heads": 2}, "num_q": 5, "num_blocks": 1}
SPRUNG = "sprung"  # the file that code in a bad input would leave


def picture(path, size=(64, 32), mode="RGB", value=None, **options):
    """`size` is (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(pixels).convert(mode) if value is None else Image.new(mode, size, value)
    image.save(path, **options)


def make_world(root):
    """Images, data sets, archives, a network and weights; a run is trained beside them."""
    for name in "abcd":
        picture(root / "data" / "images" / f"{name}.png")
        mask = np.zeros((32, 64), dtype=np.uint8)
        mask[:, 32:] = 1
        (root / "data" / "masks").mkdir(exist_ok=True)
        Image.fromarray(mask).save(root / "data" / "masks" / f"{name}.png")
        (root / "bench" / "images").mkdir(parents=True, exist_ok=True)
        (root / "bench" / "labels_masks").mkdir(exist_ok=True)
        picture(root / "bench" / "images" / f"{name}.png")
        Image.fromarray(mask).save(root / "bench" / "labels_masks" / f"{name}.png")
    (root / "data" / "classes.yaml").write_text(CLASSES)
    picture(root / "photos" / "photo.png")
    cutout = Image.new("RGBA", (24, 24), (200, 10, 10, 0))
    cutout.paste((200, 10, 10, 255), (4, 4, 20, 20))
    (root / "cutouts").mkdir()
    cutout.save(root / "cutouts" / "a.png")
    (root / "city").mkdir()
    for zipped in write_toy_streets(root / "drawn", "clear", 2, 1, (64, 128), 0).glob("*.zip"):
        zipped.rename(root / "city" / zipped.name)
    torch.manual_seed(1)  # not the weights that the run begins with
    module = MaskClassificationSemantic(**TINY)
    module.save_pretrained(root / "model")
    torch.save(module.network.state_dict(), root / "weights.bin")


# Spoiling. Each takes the folder of a case, and what it does is in its name.


def write(name, content):
    """A file with this text or these bytes, in place of whatever is there."""

    def spoil(here):
        path = here / name
        path.parent.mkdir(parents=True, exist_ok=True)
        remove(path)
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    return spoil


def remove(path):
    if path.is_dir() and not path.is_symlink():
        for child in path.iterdir():
            remove(child)
        path.rmdir()
    elif os.path.lexists(path):
        path.unlink()


def gone(name):
    return lambda here: remove(here / name)


def folder(name):
    """An empty folder in place of a file."""

    def spoil(here):
        remove(here / name)
        (here / name).mkdir(parents=True)

    return spoil


def link(name, target):
    def spoil(here):
        remove(here / name)
        (here / name).symlink_to(target)

    return spoil


def cut(name, share=0.5):
    def spoil(here):
        content = (here / name).read_bytes()
        (here / name).write_bytes(content[: int(share * len(content))])

    return spoil


def replaced(name, old, new):
    """Text within a file, which must be in it."""

    def spoil(here):
        text = (here / name).read_text()
        assert old in text
        (here / name).write_text(text.replace(old, new))

    return spoil


def coded(name, encoding):
    """A text file in another encoding."""

    def spoil(here):
        text = (here / name).read_text().replace("road", "straße").replace('"init"', '"straße": 1, "init"')
        (here / name).write_bytes(text.encode(encoding))

    return spoil


def entries(name, **changes):
    """Entries of a JSON file; `drop` leaves one out, `init` adds to what is there."""

    def spoil(here):
        content = json.loads((here / name).read_text())
        content.pop(changes.get("drop"), None)
        for key, value in changes.items():
            content[key] = content[key] | value if isinstance(content.get(key), dict) else value
        content.pop("drop", None)
        (here / name).write_text(json.dumps(content))

    return spoil


def tensors(name, edit):
    def spoil(here):
        state = load_file(here / name)
        edit(state)
        save_file(state, here / name)

    return spoil


def image(name, **how):
    return lambda here: picture(here / name, **how)


def bomb(name):
    """The header of a picture of a million by a million pixels."""
    header = b"IHDR" + (10**6).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    chunk = b"\0\0\0\x0d" + header + zlib.crc32(header).to_bytes(4, "big")
    return write(name, b"\x89PNG\r\n\x1a\n" + chunk + b"\0\0\0\0IEND\xaeB`\x82")


def archive(name, edit):
    """A zip written again; `edit(member, content)` returns the content to write, or None to leave the member out."""

    def spoil(here):
        with zipfile.ZipFile(here / name) as old:
            members = {member: old.read(member) for member in old.namelist()}
        with zipfile.ZipFile(here / name, "w") as new:
            for member, content in members.items():
                if (content := edit(member, content)) is not None:
                    new.writestr(member, content)

    return spoil


def patched(name, signature, offset, value, both=True):
    """Bytes in the headers of a zip's members: PK12 of its directory, PK34 of the members themselves."""

    def spoil(here):
        content = bytearray((here / name).read_bytes())
        for sign, place in ((b"PK\x01\x02", offset + 2), (b"PK\x03\x04", offset)) if both else signature:
            start = -1
            while (start := content.find(sign, start + 1)) >= 0:
                content[start + place : start + place + len(value)] = value
        (here / name).write_bytes(bytes(content))

    return spoil


def scribbled(name, at, junk=b"\xff" * 64):
    """Bytes written over, at a share of the file."""

    def spoil(here):
        content = bytearray((here / name).read_bytes())
        place = int(at * len(content))
        content[place : place + len(junk)] = junk
        (here / name).write_bytes(bytes(content))

    return spoil


class Trap:
    """Runs code where a pickle of it is loaded."""

    def __init__(self, place):
        self.place = place

    def __reduce__(self):
        return Path.touch, (self.place,)


def pickled(name, form="torch"):
    def spoil(here):
        trap, path = Trap(here / SPRUNG), here / name
        remove(path)
        if form == "torch":
            torch.save({"state_dict": {"q.weight": torch.zeros(2)}, "hyper_parameters": trap}, path)
        elif form == "numpy":
            with path.open("wb") as file:
                np.savez(file, confusion=np.array([trap], dtype=object))
        else:
            path.write_bytes(pickle.dumps(trap))

    return spoil


def safetensors(name, header, length=None):
    """A safetensors file of a header alone."""
    text = header.encode()
    return write(name, struct.pack("<Q", len(text) if length is None else length) + text)


def all_of(*spoils):
    def spoil(here):
        for one in spoils:
            one(here)

    return spoil


# Changing the process. Each takes pytest's monkeypatch.


def signalled(name, signum):
    """Receives a signal where this function is called."""

    def how(patch):
        module, _, attribute = name.rpartition(".")
        sent = []
        before = getattr(importlib.import_module(module), attribute)

        def call(*args, **kwargs):
            if not sent:
                sent.append(signum)
                os.kill(os.getpid(), signum)
            return before(*args, **kwargs)

        patch.setattr(name, call)

    return how


class Limit:
    """The largest size of a file, in bytes, as an attribute that can be patched."""

    @property
    def size(self):
        return resource.getrlimit(resource.RLIMIT_FSIZE)[0]

    @size.setter
    def size(self, size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def file_limit(size):
    return lambda patch: patch.setattr(Limit(), "size", size)


def ascii_screen(patch):
    patch.setattr(sys, "stdout", io.TextIOWrapper(io.FileIO(os.dup(1), "w"), encoding="ascii", write_through=True))
