"""Bad inputs of every kind: each is answered with a sentence, without a traceback, and leaves nothing half-written."""

import fnmatch
import hashlib
import importlib
import json
import os
import re
import shlex
import shutil
import signal
import threading
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import bad_inputs as bad
import pytest
from conftest import ROOT

import train_with_lora

LOGS = ("out/train_with_lora.log", "out/.lock", "out/config.yaml")  # of a start that a signal ended
DEEP = 100_000
JPEG_ZEROS = b"\xff\xd8" + bytes(400)


class Case(NamedTuple):
    """`command` is run in a folder that `spoil` has spoilt; its output must match `says`.

    `leaves` are patterns of files that may be new afterwards.
    """

    name: str
    command: str
    says: str
    spoil: Any = None
    code: int = 1
    env: Any = MappingProxyType({})  # None: unset
    leaves: tuple = ()
    finding: bool = False  # a result of looking, told in other words than those of an error
    how: Any = None  # changes the process before; takes monkeypatch


ANOMALY = "evaluate_anomaly.py model data=road_anomaly_21 data.root=bench"
IMAGES = [
    Case(
        "empty",
        "predict.py model photos out",
        r"photos/photo\.png cannot be decoded",
        bad.write("photos/photo.png", ""),
    ),
    Case(
        "text",
        "predict.py model photos out",
        r"photo\.png cannot be decoded as a picture",
        bad.write("photos/photo.png", "<html>"),
    ),
    Case(
        "cut",
        "predict.py model photos out",
        r"photo\.png (is incomplete|cannot be decoded)",
        bad.cut("photos/photo.png"),
    ),
    Case(
        "jpeg of zeros",
        "predict.py model photos/z.jpg out",
        r"photos/z\.jpg cannot be decoded",
        bad.write("photos/z.jpg", JPEG_ZEROS),
    ),
    Case(
        "promises a million by a million pixels",
        "predict.py model photos out",
        r"photo\.png is 1000000x1000000 pixels",
        bad.bomb("photos/photo.png"),
    ),
    Case(
        "floating-point",
        "predict.py model photos/f.tif out",
        r"f\.tif has 32-bit pixels",
        bad.image("photos/f.tif", mode="F", value=0.5),
    ),
    Case(
        "a folder",
        "predict.py model photos/photo.png out",
        r"photos/photo\.png: no image",
        bad.folder("photos/photo.png"),
    ),
    Case(
        "a link to itself",
        "predict.py model photos/photo.png out",
        r"photos/photo\.png",
        bad.link("photos/photo.png", "photo.png"),
    ),
    Case(
        "a link to nothing",
        "predict.py model photos out",
        r"photo2\.png",
        bad.link("photos/photo2.png", "gone.png"),
        leaves=("out/*",),
    ),
    Case("missing", "predict.py model photos/gone.png out", r"photos/gone\.png: no such file or folder"),
    Case(
        "video of text",
        "predict.py model photos/a.mp4 out",
        r"a\.mp4 is broken or no video",
        bad.write("photos/a.mp4", "no video"),
    ),
    Case("empty folder", "predict.py model nothing out", "nothing: no image", bad.folder("nothing")),
    Case(
        "animated and broken",
        "predict.py model photos/a.webp out",
        r"a\.webp",
        bad.write("photos/a.webp", b"RIFF\xff\0\0\0WEBPVP8X" + bytes(30)),
    ),
    Case(
        "training image empty",
        "TRAIN",
        r"data/images/b\.png cannot be decoded",
        bad.write("data/images/b.png", ""),
    ),
    Case(
        "training image cut",
        "TRAIN",
        r"data/images/b\.png is incomplete|b\.png cannot",
        bad.cut("data/images/b.png"),
    ),
    Case(
        "training image floating-point",
        "TRAIN",
        r"images/b\.png|b\.tif has 32-bit pixels",
        bad.all_of(bad.gone("data/images/b.png"), bad.image("data/images/b.tif", mode="F", value=0.5)),
    ),
    Case(
        "training image a link to nothing",
        "TRAIN",
        r"images/b\.png",
        bad.link("data/images/b.png", "gone.png"),
    ),
    Case("no training images", "TRAIN", r"data/images has no picture", bad.folder("data/images")),
    Case("images are a file", "TRAIN", r"data/images is a file, a folder is meant", bad.write("data/images", "x")),
    Case(
        "image to merge on empty",
        "merge_lora.py run out --images photos",
        r"photos/photo\.png cannot be decoded",
        bad.write("photos/photo.png", ""),
    ),
    Case(
        "image of one pixel",
        "predict.py model photos/p.png out",
        "1 images written",
        bad.image("photos/p.png", size=(1, 1)),
        code=0,
        leaves=("out/*",),
    ),
    Case(
        "name with a newline",
        "predict.py model photos out",
        r"cannot be decoded",
        bad.write("photos/a\nb.png", "no picture"),
        leaves=("out/*",),
    ),
    Case(
        "benchmark image cut",
        ANOMALY,
        r"bench/images/b\.png",
        bad.cut("bench/images/b.png"),
        leaves=("model/anomaly/logits/*",),
    ),
    Case(
        "cut-out opaque",
        "make_cut_paste.py --out out DATA data/cut_paste=folder data.cut_paste.cutouts.root=cutouts",
        r"cutouts/a\.png has no alpha",
        bad.image("cutouts/a.png"),
    ),
    Case(
        "cut-out empty",
        "make_cut_paste.py --out out DATA data/cut_paste=folder data.cut_paste.cutouts.root=cutouts",
        r"cutouts/a\.png cannot be decoded",
        bad.write("cutouts/a.png", ""),
    ),
]
COCO = "make_cut_paste.py --out out DATA data/cut_paste=coco data.cut_paste.cutouts.annotations=coco.json"
COCO += " data.cut_paste.cutouts.images=photos"
REPORT = "dataset_report.py DATA --out out"
LABELS = [
    Case(
        "of another size",
        "TRAIN",
        r"one size: .*images/b\.png is 32x64, .*masks/b\.png is 32x32",
        bad.image("data/masks/b.png", size=(32, 32), mode="L", value=1),
    ),
    Case(
        "unknown value",
        "TRAIN",
        r"masks/b\.png has the value 9, which no class lists",
        bad.image("data/masks/b.png", mode="L", value=9),
    ),
    Case(
        "colours for ids",
        "TRAIN",
        r"masks/b\.png must have a single channel",
        bad.image("data/masks/b.png"),
    ),
    Case(
        "16 bits",
        "TRAIN",
        r"masks/b\.png has the value 700",
        bad.image("data/masks/b.png", mode="I;16", value=700),
    ),
    Case(
        "negative",
        "TRAIN",
        r"masks/b\.tif has the value -1",
        bad.all_of(bad.gone("data/masks/b.png"), bad.image("data/masks/b.tif", mode="I", value=-1)),
    ),
    Case(
        "fractions",
        "TRAIN",
        r"masks/b\.tif has the value 0\.5",
        bad.all_of(bad.gone("data/masks/b.png"), bad.image("data/masks/b.tif", mode="F", value=0.5)),
    ),
    Case(
        "missing",
        "TRAIN",
        r"1 of 4 images in .*data/images have no mask, the first is 'b'",
        bad.gone("data/masks/b.png"),
    ),
    Case(
        "empty file",
        "dataset_report.py DATA --out out",
        r"masks/b\.png cannot be decoded",
        bad.write("data/masks/b.png", ""),
        leaves=("out/*",),
        finding=True,
    ),
    Case(
        "of a benchmark, unknown",
        ANOMALY,
        r"labels_masks/b\.png has the value 7",
        bad.image("bench/labels_masks/b.png", mode="L", value=7),
    ),
    Case("of a benchmark, missing", ANOMALY, r"labels_masks/b\.png has no image", bad.gone("bench/images/b.png")),
    Case(
        "classes empty",
        REPORT,
        r"data/classes\.yaml is empty: `.*--init IMAGES MASKS > .*` writes it, unless it stops with an error",
        bad.write("data/classes.yaml", "\n"),
        code=2,
    ),
    Case(
        "classes none",
        REPORT,
        r"classes\.yaml must have a list",
        bad.write("data/classes.yaml", "classes: []"),
        code=2,
    ),
    Case(
        "classes 255",
        REPORT,
        r"1 to 254 classes, got 255",
        bad.write(
            "data/classes.yaml",
            "classes:\n" + "".join(f"- {{name: c{k}, color: [{k}, 0, 0], ids: [{k}]}}\n" for k in range(255)),
        ),
        code=2,
    ),
    Case(
        "classes share an id",
        REPORT,
        r"classes\.yaml lists the mask value 0 more than once",
        bad.replaced("data/classes.yaml", "ids: [1]", "ids: [0]"),
        code=2,
    ),
    Case(
        "classes of one name",
        REPORT,
        r"classes\.yaml.*'road' occurs more than once",
        bad.replaced("data/classes.yaml", "sky", "road"),
        code=2,
    ),
    Case(
        "class with a colour of 300",
        REPORT,
        r"classes\.yaml, class 0 \(road\) needs a `color`",
        bad.replaced("data/classes.yaml", "[128, 64", "[300, 64"),
        code=2,
    ),
    Case(
        "class id nan",
        REPORT,
        r"classes\.yaml: a mask value must be an id",
        bad.replaced("data/classes.yaml", "ids: [1]", "ids: [.nan]"),
        code=2,
    ),
    Case(
        "classes with a tab",
        REPORT,
        r"classes\.yaml cannot be read",
        bad.write("data/classes.yaml", "classes:\n\t- x"),
        code=2,
    ),
    Case(
        "classes in Latin-1",
        REPORT,
        r"classes\.yaml cannot be read.*utf-8",
        bad.coded("data/classes.yaml", "latin-1"),
        code=2,
    ),
    Case(
        "classes in UTF-16",
        REPORT,
        r"classes\.yaml cannot be read.*utf-8",
        bad.coded("data/classes.yaml", "utf-16"),
        code=2,
    ),
    Case(
        "classes with a key twice",
        REPORT,
        r"classes\.yaml cannot be read.*ignore_ids",
        bad.replaced("data/classes.yaml", "ignore_ids", "ignore_ids: [3]\nignore_ids"),
        code=2,
    ),
    Case(
        "classes with code",
        REPORT,
        r"classes\.yaml cannot be read",
        bad.write("data/classes.yaml", f"classes: !!python/object/apply:os.system ['touch {bad.SPRUNG}']"),
        code=2,
    ),
    Case(
        "classes nested",
        REPORT,
        r"classes\.yaml cannot be read",
        bad.write("data/classes.yaml", "[" * 1500),
        code=2,
    ),
    Case(
        "classes are a folder",
        REPORT,
        r"data\.classes must be a YAML file",
        bad.folder("data/classes.yaml"),
        code=2,
    ),
    Case(
        "classes of zeros",
        REPORT,
        r"classes\.yaml cannot be read",
        bad.write("data/classes.yaml", bytes(400)),
        code=2,
    ),
    Case("COCO is no JSON", COCO, r"coco\.json", bad.write("coco.json", "{")),
    Case("COCO nested", COCO, r"coco\.json", bad.write("coco.json", "[" * DEEP)),
    Case("COCO of a list", COCO, r"coco\.json is no file of COCO annotations", bad.write("coco.json", "[1]")),
]
CITY = "dataset_report.py data=cityscapes data.root=city data.num_workers=0 --out out"
CITY_RUN = "train_with_lora.py data=cityscapes data.root=city data.batch_size=1 data.num_workers=0 NET output_dir=out"
ZIP, GT = "city/leftImg8bit_trainvaltest.zip", "city/gtFine_trainvaltest.zip"
ARCHIVES = [
    Case("empty", CITY, r"leftImg8bit_trainvaltest\.zip is no complete zip archive", bad.write(ZIP, ""), code=2),
    Case("half", CITY, r"leftImg8bit_trainvaltest\.zip is no complete zip archive", bad.cut(ZIP), code=2),
    Case(
        "a page of text",
        CITY,
        r"leftImg8bit_trainvaltest\.zip is no complete zip archive",
        bad.write(ZIP, "<html>"),
        code=2,
    ),
    Case("a folder", CITY, r"Cityscapes needs .*leftImg8bit_trainvaltest\.zip", bad.folder(ZIP), code=2),
    Case("missing", CITY, r"Cityscapes needs .*gtFine_trainvaltest\.zip", bad.gone(GT), code=2),
    Case("without members", CITY, r"No image leftImg8bit/train", bad.archive(ZIP, lambda *_: None), code=2),
    Case(
        "without a label",
        CITY,
        r"1 of 3 images in city have no label file",
        bad.archive(GT, lambda name, content: None if "toyburg" in name else content),
        code=2,
    ),
    Case(
        "without an image",
        CITY,
        r"has no image leftImg8bit/train",
        bad.archive(ZIP, lambda name, content: None if "000001" in name else content),
        code=2,
    ),
    Case(
        "wrong checksum",
        CITY,
        r"leftImg8bit_trainvaltest\.zip/leftImg8bit/.* is damaged",
        bad.patched(ZIP, None, 14, b"\x01\x02\x03\x04"),
        leaves=("out/*",),
        finding=True,
    ),
    Case(
        "encrypted",
        CITY,
        r"leftImg8bit_trainvaltest\.zip/leftImg8bit/.* encrypted",
        bad.patched(ZIP, None, 6, b"\x01"),
        leaves=("out/*",),
        finding=True,
    ),
    Case(
        "compressed in an unknown way",
        CITY,
        r"leftImg8bit_trainvaltest\.zip/leftImg8bit/.*",
        bad.patched(ZIP, None, 8, b"\x63"),
        leaves=("out/*",),
        finding=True,
    ),
    Case(
        "LZMA that is none",
        CITY,
        r"leftImg8bit_trainvaltest\.zip/leftImg8bit/.*",
        bad.patched(ZIP, None, 8, b"\x0e"),
        leaves=("out/*",),
        finding=True,
    ),
    Case("directory overwritten", CITY, r"leftImg8bit_trainvaltest\.zip", bad.scribbled(ZIP, 0.995), code=2),
    Case(
        "members of text",
        CITY,
        r"leftImg8bit_trainvaltest\.zip/leftImg8bit/.* cannot be decoded",
        bad.archive(ZIP, lambda *_: b"x"),
        leaves=("out/*",),
        finding=True,
    ),
    Case(
        "member of no bytes, in training",
        CITY_RUN,
        r"leftImg8bit_trainvaltest\.zip/leftImg8bit/.* cannot be decoded",
        bad.archive(ZIP, lambda *_: b""),
    ),
    Case(
        "encrypted, in training",
        CITY_RUN,
        r"leftImg8bit_trainvaltest\.zip/leftImg8bit/.* encrypted",
        bad.patched(ZIP, None, 6, b"\x01"),
    ),
]
CONFIGURATIONS = [
    Case(f"{word}", f"TRAIN {word}", says, code=code)
    for word, says, code in [
        ("model.lr=nan", "lr nan", 1),
        ("model.lr=inf", "lr inf", 1),
        ("model.lr=-1", "lr -1", 1),
        ("model.lr=fast", "model.lr 'fast'", 1),
        ("model.img_size=[1e9,32]", "img_size", 1),
        ("model.img_size=[]", "img_size", 1),
        ("model.img_size=[-32,32]", "img_size", 1),
        ("model.num_q=0", "num_q 0", 1),
        ("model.num_blocks=9", "num_blocks", 1),
        ("model.backbone_name=vit_nothing", "vit_nothing", 1),
        ("model.backbone_kwargs=[1]", "model.backbone_kwargs", 2),
        ("model.backbone_kwargs={embed_dim:33,depth:2,num_heads:2}", "backbone", 1),
        ("model.backbone_kwargs={embed_dim:-32}", "backbone", 1),
        ("data.batch_size=0", "batch_size", 1),
        ("data.batch_size=1e99", "data.batch_size", 1),
        ("data.batch_size=99999999999999999999", "batch_size", 1),
        ("data.num_workers=-1", "num_workers", 1),
        ("data.val_share=2", "data.val_share must lie between 0 and 1", 1),
        ("data.val_share=nan", "data.val_share must lie between 0 and 1", 1),
        ("data.split_seed=none", "data.split_seed", 1),
        ("trainer.max_epochs=0", "trainer.max_epochs 0", 1),
        ("trainer.max_epochs=nan", "trainer.max_epochs", 1),
        ("trainer.accelerator=abacus", "abacus", 1),
        ("trainer.precision=3", "precision", 1),
        ("trainer.callbacks=3", "trainer.callbacks", 2),
        ("seed=-1", "seed -1", 1),
        ("seed=1e3", "seed 1000.0", 1),
        ("seed=None", "seed 'None'", 1),
        ("data._target_=os.system", "os.system", 1),
        ("model._target_=eomt.nothing.Class", "eomt.nothing", 1),
        ("model=nowhere", "nowhere", 2),
        ("name=${nothing}", "nothing", 1),
        ("name=${oc.env:NOTHING}", "NOTHING", 1),
        ("name=${name}", "name", 1),
        ("data.images=null", "data.images", 1),
        ("=3", "group override", 2),
        ("--config-name nowhere", "nowhere", 2),
        ("--config-dir nowhere", "nowhere", 2),
        ("--epochs", "--epochs takes 1 value", 2),
        ("callbacks=null", "[Cc]onfig group override", 2),
        ("~data", "data", 2),
        ("logger.csv=3", "logger.csv 3", 1),
        ("callbacks.samples=null", "callbacks.samples None", 1),
        ("model.lora_options={nothing:1} model.use_lora=true", "nothing", 1),
        ("resume=run", "resume .*run is a folder, a checkpoint is meant", 1),
        ("resume=run/adapter/adapter_model.safetensors", "resume .*adapter_model", 1),
        ("resume=weights.bin", "resume .*weights.bin: it is no checkpoint of a run", 1),
        ("resume=run/checkpoints/last.ckpt", "resume: the checkpoint was trained with", 1),
        ("output_dir=", "output_dir= names no folder", 2),
    ]
]  # fmt: skip
OWN = "TRAIN --config-dir mine --config-name own"
FILES_OF_SETTINGS = [
    Case(
        "configuration in Latin-1",
        OWN,
        r"own|utf",
        bad.write("mine/own.yaml", "defaults: [cityscapes, _self_]\nname: straße\n".encode("latin-1")),
        code=2,
    ),
    Case("configuration of a list", OWN, r"own", bad.write("mine/own.yaml", "[1]"), code=2),
    Case("configuration empty", OWN, r"own|data", bad.write("mine/own.yaml", ""), code=2),
    Case(
        "configuration with a key twice",
        OWN,
        r"own|duplicate",
        bad.write("mine/own.yaml", "defaults: [cityscapes, _self_]\nseed: 1\nseed: 2\n"),
        code=2,
    ),
    Case(
        "configuration with code",
        OWN,
        r"own|tag",
        bad.write(
            "mine/own.yaml",
            f"defaults: [cityscapes, _self_]\nname: !!python/object/apply:os.system ['touch {bad.SPRUNG}']\n",
        ),
        code=2,
    ),
    Case(
        "configuration with a tab",
        OWN,
        r"own|tab|token",
        bad.write("mine/own.yaml", "defaults:\n\t- cityscapes\n"),
        code=2,
    ),
    Case("configuration nested", OWN, r"own|nested", bad.write("mine/own.yaml", "name: " + "[" * 1500), code=2),
    Case("of a run missing", "evaluate.py run", r"run has no config\.yaml", bad.gone("run/config.yaml")),
    Case("of a run cut", "evaluate.py run", r"run/config\.yaml", bad.cut("run/config.yaml", 0.03)),
    Case("of a run empty", "evaluate.py run", r"run/config\.yaml", bad.write("run/config.yaml", "")),
    Case("of a run a folder", "evaluate.py run", r"run has no config\.yaml", bad.folder("run/config.yaml")),
    Case("of a run in UTF-16", "evaluate.py run", r"run/config\.yaml", bad.coded("run/config.yaml", "utf-16")),
    Case(
        "of a run without data",
        "evaluate.py run",
        r"run/config\.yaml does not say them",
        bad.write("run/config.yaml", "data: 3"),
    ),
    Case(
        "of a run with text for data",
        "compare.py evaluate run",
        r"run/config\.yaml",
        bad.replaced("run/config.yaml", "precision:", "precisely:"),
    ),
    Case("of a run nested", "evaluate.py run", r"run/config\.yaml", bad.write("run/config.yaml", "[" * 1500)),
    Case(
        "of a run with a loop",
        "evaluate.py run",
        r"run/config\.yaml|name",
        bad.replaced("run/config.yaml", "val_share: 0.2", "val_share: ${data.val_share}"),
    ),
    Case("summary cut", "evaluate.py run", r"run/summary\.json cannot be read", bad.cut("run/summary.json")),
    Case(
        "summary empty", "compare.py report run", r"run/summary\.json cannot be read", bad.write("run/summary.json", "")
    ),
    Case(
        "summary of a list",
        "compare.py report run",
        r"run/summary\.json holds a list",
        bad.write("run/summary.json", "[]"),
    ),
    Case(
        "summary nested",
        "compare.py report run",
        r"run/summary\.json cannot be read",
        bad.write("run/summary.json", "[" * DEEP),
    ),
    Case(
        "summary without status",
        "compare.py report run",
        r"run/summary\.json has no status",
        bad.entries("run/summary.json", drop="status"),
    ),
    Case(
        "summary without machine",
        "compare.py evaluate run",
        "",
        bad.entries("run/summary.json", drop="machine"),
        code=0,
        leaves=("run/evaluation/*",),
    ),
    Case(
        "summary of text for the score",
        "compare.py report run",
        r"run/summary\.json",
        bad.entries("run/summary.json", miou="high"),
    ),
    Case(
        "summary with a score of nan",
        "compare.py report run",
        r"run/summary\.json",
        bad.entries("run/summary.json", miou=float("nan")),
    ),
    Case(
        "summary of the next version",
        "compare.py evaluate run",
        r"run/summary\.json has schema_version 99",
        bad.entries("run/summary.json", schema_version=99),
    ),
    Case(
        "summary names a folder elsewhere",
        "compare.py evaluate run",
        r"run/summary\.json names as artefact",
        bad.entries("run/summary.json", artefact="../model"),
    ),
    Case("no run", "compare.py report photos", "photos holds no run"),
    Case("no such folder", "compare.py report nowhere", "nowhere: no such folder"),
    Case(
        "metrics of text",
        "compare.py report run",
        r"run/metrics\.csv",
        bad.write("run/metrics.csv", "step,val/miou\nlast,high\n"),
    ),
    Case(
        "metrics without steps",
        "compare.py report run",
        r"run/metrics\.csv",
        bad.write("run/metrics.csv", "val/miou\n0.5\n"),
    ),
    Case("metrics of zeros", "compare.py report run", r"run/metrics\.csv", bad.write("run/metrics.csv", bytes(400))),
    Case(
        "matrix cut",
        "compare.py report matrix",
        r"matrix/matrix\.json cannot be read",
        bad.write("matrix/matrix.json", '{"variants": ['),
    ),
    Case("cell of a list", "compare.py report run", r"run/cell\.json holds a list", bad.write("run/cell.json", "[]")),
    Case(
        "evaluation of another shape",
        "compare.py report run",
        r"run/evaluation/target\.json has no miou",
        bad.write("run/evaluation/target.json", '{"class_iou": {}}'),
    ),
    Case(
        "counts with code",
        "compare.py report run",
        r"run/evaluation/target\.npz",
        bad.all_of(
            bad.write(
                "run/evaluation/target.json",
                json.dumps({"miou": 0.5, "class_iou": {"a": 0.5}, "classes": ["a"], "images": ["x"]}),
            ),
            bad.pickled("run/evaluation/target.npz", "numpy"),
        ),
    ),
]
SAFE = "model/model.safetensors"
PREDICT, INSPECT = "predict.py model photos out", "inspect_model.py model"
CKPT = "run/checkpoints/last.ckpt"
CHECKPOINTS = [
    Case("safetensors empty", PREDICT, r"model/model\.safetensors cannot be read", bad.write(SAFE, "")),
    Case("safetensors cut in its header", PREDICT, r"model/model\.safetensors cannot be read", bad.cut(SAFE, 0.005)),
    Case("safetensors cut", INSPECT, r"model/model\.safetensors cannot be read", bad.cut(SAFE, 0.9)),
    Case(
        "safetensors of a header longer than the file",
        INSPECT,
        r"model\.safetensors cannot be read",
        bad.safetensors(SAFE, "{}", 2**40),
    ),
    Case(
        "safetensors of a header that is no JSON",
        INSPECT,
        r"model\.safetensors cannot be read",
        bad.safetensors(SAFE, "{'a'"),
    ),
    Case(
        "safetensors of a nested header",
        INSPECT,
        r"model\.safetensors cannot be read",
        bad.safetensors(SAFE, "[" * DEEP),
    ),
    Case("safetensors without tensors", INSPECT, "model holds no tensors", bad.safetensors(SAFE, "{}")),
    Case(
        "safetensors of an unknown kind",
        INSPECT,
        r"model\.safetensors cannot be read",
        bad.safetensors(SAFE, '{"a":{"dtype":"Q7","shape":[1],"data_offsets":[0,1]}}'),
    ),
    Case("safetensors a folder", PREDICT, r"model\.safetensors: no such file", bad.folder(SAFE)),
    Case("safetensors a pickle", PREDICT, r"model\.safetensors cannot be read", bad.pickled(SAFE, "plain")),
    Case(
        "weights that are not finite",
        PREDICT,
        r"model",
        bad.tensors(SAFE, lambda state: state["network.q.weight"].fill_(float("nan"))),
    ),
    Case("checkpoint empty", f"predict.py {CKPT} photos out", r"last\.ckpt cannot be read", bad.write(CKPT, "")),
    Case("checkpoint half", f"evaluate.py {CKPT}", r"last\.ckpt cannot be read", bad.cut(CKPT)),
    Case("checkpoint cut at its start", f"inspect_model.py {CKPT}", r"last\.ckpt cannot be read", bad.cut(CKPT, 0.01)),
    Case("checkpoint cut at its end", f"merge_lora.py {CKPT} out", r"last\.ckpt cannot be read", bad.cut(CKPT, 0.99)),
    Case(
        "checkpoint of text",
        f"doctor.py {CKPT}",
        r"last\.ckpt cannot be read",
        bad.write(CKPT, "no checkpoint"),
        code=2,
    ),
    Case(
        "checkpoint of zeros",
        f"predict.py {CKPT} photos out",
        r"last\.ckpt cannot be read",
        bad.write(CKPT, bytes(4000)),
    ),
    Case(
        "checkpoint with code",
        f"predict.py {CKPT} photos out",
        r"last\.ckpt cannot be read.*pickled",
        bad.pickled(CKPT),
    ),
    Case(
        "checkpoint a plain pickle",
        f"evaluate_anomaly.py {CKPT} data=road_anomaly_21 data.root=bench",
        r"last\.ckpt cannot be read",
        bad.pickled(CKPT, "plain"),
    ),
    Case(
        "checkpoint with code, to resume",
        f"TRAIN resume={CKPT}",
        r"last\.ckpt cannot be read",
        bad.pickled(CKPT),
    ),
    Case("checkpoint half, to resume", f"TRAIN resume={CKPT}", r"last\.ckpt cannot be read", bad.cut(CKPT)),
    Case(
        "start weights empty",
        "TRAIN model.ckpt_path=weights.bin",
        r"weights\.bin cannot be read",
        bad.write("weights.bin", ""),
    ),
    Case(
        "start weights half",
        "TRAIN model.ckpt_path=weights.bin",
        r"weights\.bin cannot be read",
        bad.cut("weights.bin"),
    ),
    Case(
        "start weights with code",
        "TRAIN model.ckpt_path=weights.bin",
        r"weights\.bin cannot be read",
        bad.pickled("weights.bin"),
    ),
    Case("start weights a folder of pictures", "TRAIN model.ckpt_path=photos", r"photos"),
    Case("start weights an adapter", "TRAIN model.ckpt_path=run/adapter", r"run/adapter is an adapter"),
    Case(
        "start weights of another network",
        "TRAIN model.ckpt_path=weights.bin model.num_q=7",
        r"weights\.bin has num_q 5, the configuration says 7",
    ),
    Case("start weights a picture", "TRAIN model.ckpt_path=photos/photo.png", r"photo\.png cannot be read"),
    Case("start weights with a name of NUL", "TRAIN 'model.ckpt_path=\0'", r"ckpt_path", code=2),
    Case("no network", "predict.py photos photos out", r"photos has no eomt_config\.json"),
    Case("no such network", "evaluate.py modle", r"modle: no such file or folder; did you mean model\?"),
    Case("bare weights", "predict.py weights.bin photos out", r"weights\.bin holds weights without a configuration"),
    Case("network a link to itself", "predict.py loop photos out", r"loop", bad.link("loop", "loop")),
]
CONFIG, PEFT, HEADS = "run/adapter/eomt_config.json", "run/adapter/adapter_config.json", "run/adapter/heads.safetensors"
LORA_WEIGHTS = "run/adapter/adapter_model.safetensors"
OPEN = "predict.py run/adapter photos out"
ADAPTERS = [
    Case("configuration empty", OPEN, r"adapter/eomt_config\.json cannot be read", bad.write(CONFIG, "")),
    Case("configuration cut", OPEN, r"adapter/eomt_config\.json cannot be read", bad.cut(CONFIG)),
    Case("configuration nested", OPEN, r"adapter/eomt_config\.json cannot be read", bad.write(CONFIG, '{"a":' * DEEP)),
    Case("configuration in UTF-16", OPEN, r"adapter/eomt_config\.json cannot be read", bad.coded(CONFIG, "utf-16")),
    Case("configuration in Latin-1", OPEN, r"adapter/eomt_config\.json cannot be read", bad.coded(CONFIG, "latin-1")),
    Case(
        "configuration with a byte-order mark",
        "evaluate.py run/adapter",
        r"adapter/eomt_config\.json cannot be read",
        lambda here: (here / CONFIG).write_text((here / CONFIG).read_text(), encoding="utf-8-sig"),
    ),
    Case("configuration a folder", OPEN, r"adapter has no eomt_config\.json", bad.folder(CONFIG)),
    Case(
        "configuration without settings",
        OPEN,
        r"eomt_config\.json has no settings in `init`",
        bad.entries(CONFIG, drop="init"),
    ),
    Case(
        "configuration with an unknown setting",
        OPEN,
        r"eomt_config\.json: num_queries is unknown; did you mean num_q",
        bad.entries(CONFIG, init={"num_queries": 3}, artefact_id=None),
    ),
    Case(
        "configuration with a key twice",
        OPEN,
        r"eomt_config\.json cannot be read.*schema",
        bad.replaced(CONFIG, '"schema": 1', '"schema": 1, "schema": 1'),
    ),
    Case(
        "configuration of a million classes",
        OPEN,
        r"eomt_config\.json: num_classes",
        bad.entries(CONFIG, init={"num_classes": 10**6}, artefact_id=None),
    ),
    Case(
        "configuration of too large images",
        OPEN,
        r"allocate memory",
        bad.entries(CONFIG, init={"img_size": [10**9, 10**9]}, artefact_id=None),
    ),
    Case(
        "configuration with infinity",
        OPEN,
        r"eomt_config\.json: lr",
        bad.entries(CONFIG, init={"lr": float("inf")}, artefact_id=None),
    ),
    Case(
        "configuration with a number of 5,000 digits",
        OPEN,
        r"eomt_config\.json cannot be read",
        bad.replaced(CONFIG, '"num_q": 5', '"num_q": ' + "5" * 5000),
    ),
    Case(
        "configuration of another size",
        OPEN,
        r"num_q|no longer what was saved|shape|heads",
        bad.entries(CONFIG, init={"num_q": 7}, artefact_id=None),
    ),
    Case(
        "configuration with other names",
        OPEN,
        r"eomt_config\.json",
        bad.entries(CONFIG, init={"class_names": ["a"]}, artefact_id=None),
    ),
    Case(
        "configuration with colours of text",
        OPEN,
        r"eomt_config\.json",
        bad.entries(CONFIG, init={"class_colors": ["red", "blue"]}, artefact_id=None),
    ),
    Case("edited", OPEN, r"adapter is no longer what was saved", bad.entries(CONFIG, init={"lr": 0.5})),
    Case("PEFT's configuration empty", OPEN, r"adapter_config\.json cannot be read", bad.write(PEFT, "")),
    Case(
        "PEFT's configuration nested",
        "inspect_model.py run/adapter",
        r"adapter_config\.json cannot be read",
        bad.write(PEFT, "[" * DEEP),
    ),
    Case("PEFT's configuration missing", OPEN, r"adapter_config\.json is missing", bad.gone(PEFT)),
    Case("another rank", OPEN, r"adapter_config\.json says r 8", bad.entries(PEFT, r=8)),
    Case("a huge rank", OPEN, r"adapter_config\.json", bad.entries(PEFT, r=10**30)),
    Case("an alpha of infinity", OPEN, r"adapter_config\.json", bad.entries(PEFT, lora_alpha=float("inf"))),
    Case("another method", OPEN, r"adapter_config\.json says peft_type IA3", bad.entries(PEFT, peft_type="IA3")),
    Case("weights cut", OPEN, r"adapter_model\.safetensors cannot be read", bad.cut(LORA_WEIGHTS)),
    Case(
        "weights missing",
        "merge_lora.py run/adapter out",
        r"adapter_model\.safetensors is missing",
        bad.gone(LORA_WEIGHTS),
    ),
    Case("heads cut", OPEN, r"heads\.safetensors cannot be read", bad.cut(HEADS)),
    Case(
        "heads of other shapes",
        OPEN,
        r"heads\.safetensors does not fit: network\.q\.weight is \[4, 32\]",
        bad.tensors(HEADS, lambda state: state.update({"network.q.weight": state["network.q.weight"][:4].clone()})),
    ),
    Case(
        "heads without a tensor",
        OPEN,
        r"heads\.safetensors does not fit this network",
        bad.tensors(HEADS, lambda state: state.pop("network.q.weight")),
    ),
    Case("base cut", OPEN, r"base\.safetensors cannot be read", bad.cut("run/adapter/base.safetensors")),
    Case(
        "on another base", f"{OPEN} --ckpt_path model", r"was trained on base weights that this backbone does not have"
    ),
    Case("on a base that is not there", f"{OPEN} --ckpt_path nowhere", r"nowhere"),
    Case("an empty folder", "merge_lora.py empty out", r"empty has no eomt_config\.json", bad.folder("empty")),
    Case("a part of one", f"predict.py {HEADS} photos out", r"heads\.safetensors is a part of what was saved"),
    Case("merging a whole network", "merge_lora.py model out --images photos", r"model is a whole network"),
    Case("another network's base to inspect with", "inspect_model.py run/adapter --base model", "", finding=True),
    Case("a run without its adapter", "doctor.py run/adapter", r"no such file", bad.gone("run/adapter"), code=2),
]
LONG = "x" * 300
OUTPUTS = [
    Case("a run into a file", "TRAIN output_dir=weights.bin", r"weights\.bin", code=1),
    Case("a run under a file", "TRAIN output_dir=weights.bin/run", r"weights\.bin"),
    Case("a run of a long name", f"TRAIN output_dir={LONG}", r"xxx"),
    Case("a run of a name with NUL", "TRAIN 'output_dir=a\0b'", r"output_dir", code=2),
    Case("a run in /proc", "TRAIN output_dir=/proc/run", r"/proc/run"),
    Case("a run in a read-only place", "TRAIN output_dir=/sys/run", r"/sys/run"),
    Case(
        "a run over another",
        "TRAIN output_dir=run",
        r"run holds a run: continue it with resume=auto",
        leaves=("run/train_with_lora.log",),
    ),
    Case("pictures into a file", "predict.py model photos weights.bin", r"weights\.bin is a file"),
    Case("pictures under a file", "predict.py model photos weights.bin/out", r"weights\.bin"),
    Case("pictures to /proc", "predict.py model photos /proc/out", r"/proc/out"),
    Case("scores into a file", "evaluate.py run --output weights.bin", r"weights\.bin"),
    Case("scores to /proc", "evaluate.py run --output /proc/out", r"/proc/out"),
    Case(
        "anomaly scores under a file",
        "evaluate_anomaly.py model data=road_anomaly_21 data.root=bench --output weights.bin/out",
        r"weights\.bin",
    ),
    Case(
        "a merged network into a file",
        "merge_lora.py run weights.bin --images photos",
        r"weights\.bin exists and is not empty",
    ),
    Case("a merged network over another", "merge_lora.py run model --images photos", r"model exists and is not empty"),
    Case("a merged network to /proc", "merge_lora.py run /proc/out --images photos", r"/proc/out"),
    Case("facts into a folder", "inspect_model.py model --json photos", r"photos"),
    Case("facts to /proc", "inspect_model.py model --json /proc/facts.json", r"/proc"),
    Case("a plot of an unknown kind", "inspect_model.py run --plot plot.nothing", r"plot\.nothing"),
    Case("findings to /proc", "doctor.py run --json /proc/findings.json", r"/proc", code=2),
    Case("costs into a folder", "cost.py NET data=toy_streets --json photos", r"photos"),
    Case("a report of data under a file", "dataset_report.py DATA --out weights.bin/out", r"weights\.bin", code=2),
    Case("a report of runs under a file", "compare.py report run --output weights.bin/out", r"weights\.bin"),
    Case(
        "pasted data where something is",
        "make_cut_paste.py --out photos DATA data/cut_paste=toy",
        r"photos is there already",
    ),
    Case(
        "pasted data to /proc",
        "make_cut_paste.py --out /proc/out data=cityscapes data.root=city data/cut_paste=toy",
        r"/proc/out",
    ),
    Case("a matrix under a file", "compare.py run DATA NET variants=[head] output_dir=weights.bin/m", r"weights\.bin"),
    Case(
        "a matrix of no variant",
        "compare.py run DATA NET variants=[nothing]",
        r"variant nothing is not in configs/variant",
    ),
    Case("a matrix of odd seeds", "compare.py run DATA NET variants=[head] seeds=[one]", r"seeds are integers"),
    Case(
        "a job with unknown settings",
        "launch_lightning.py --machine L4 --dry-run -- model.lora_rnk=3",
        r"model\.lora_rnk is not in the configuration",
        code=2,
    ),
    Case(
        "a job into a folder of NUL",
        "launch_lightning.py --machine L4 --dry-run -- 'output_dir=a\0b'",
        r"output_dir",
        code=2,
    ),
    Case("a cost of nothing", "cost.py NET data=toy_streets --memory nan", r"--memory nan"),
    Case("a tolerance of nan", "merge_lora.py run out --images photos --tolerance nan", r"tolerance"),
    Case("an unknown precision", "evaluate.py run --precision half", r"Precision 'half' is invalid"),
]
ENVIRONMENT = [
    Case(
        "EOMT_CACHE a file",
        "train_with_lora.py TOYS NET output_dir=out",
        r"weights\.bin",
        env={"EOMT_CACHE": "weights.bin"},
    ),
    Case(
        "EOMT_CACHE in /proc",
        "dataset_report.py TOYS --out out",
        r"/proc/cache",
        env={"EOMT_CACHE": "/proc/cache"},
        code=2,
    ),
    Case(
        "EOMT_CACHE a file, hashes alone",
        "evaluate.py run",
        "mIoU",
        env={"EOMT_CACHE": "weights.bin"},
        code=0,
        leaves=("run/evaluation/*",),
    ),
    Case(
        "HOME in /proc",
        "dataset_report.py TOYS --out out",
        r"/proc/home",
        env={"EOMT_CACHE": None, "HOME": "/proc/home"},
        code=2,
    ),
    Case(
        "HOME unset",
        "predict.py model photos out",
        "1 images written",
        env={"HOME": None, "EOMT_CACHE": None},
        code=0,
        leaves=("out/*",),
    ),
    Case("LOCAL_RANK=abc", "TRAIN", "LOCAL_RANK=abc", env={"LOCAL_RANK": "abc"}, code=2),
    Case(
        "TMPDIR not there",
        PREDICT,
        "1 images written",
        how=lambda patch: (patch.setenv("TMPDIR", "nowhere"), patch.setattr("tempfile.tempdir", None)),
        code=0,
        leaves=("out/*",),
    ),
    Case(
        "CUDA_VISIBLE_DEVICES=abc", f"{PREDICT} --device cuda", "torch sees no GPU", env={"CUDA_VISIBLE_DEVICES": "abc"}
    ),
    Case("HYDRA_FULL_ERROR=abc", "TRAIN model.lr=-1", "lr -1", env={"HYDRA_FULL_ERROR": "abc"}),
    Case(
        "a screen of ASCII",
        "predict.py model photos straße",
        "1 images written",
        how=bad.ascii_screen,
        code=0,
        leaves=("straße/*",),
    ),
    Case(
        "a limit on files, training", "TRAIN", "no room for .*out/model", how=bad.file_limit(60_000), leaves=("out/*",)
    ),
    Case(
        "a limit on files, merging",
        "merge_lora.py run out --images photos",
        "no room for out",
        how=bad.file_limit(60_000),
    ),
    Case("a limit on files, pictures", PREDICT, "no room for", how=bad.file_limit(1000)),
    Case("a limit on files, scores", "evaluate.py run", "no room for", how=bad.file_limit(400)),
    Case("RANK=-1", "TRAIN", "RANK=-1", env={"RANK": "-1"}, code=2),
    Case("WORLD_SIZE=abc", "TRAIN", "WORLD_SIZE=abc", env={"WORLD_SIZE": "abc"}, code=2),
    Case("SLURM_NTASKS=abc", "TRAIN", "SLURM_NTASKS=abc", env={"SLURM_NTASKS": "abc", "SLURM_PROCID": "0"}, code=2),
]
WRITING = "eomt.files._to_disk"  # is called when a draft is written and nothing is in its place yet
SIGNALS = [
    Case(
        f"{name} while {command.split()[0]} writes",
        command,
        f"interrupted by {name}",
        code=128 + signal.Signals[name],
        how=bad.signalled(WRITING, signal.Signals[name]),
        leaves=leaves,
    )
    for name, command, leaves in [
        ("SIGTERM", PREDICT, ("out/*",)),
        ("SIGINT", PREDICT, ("out/*",)),
        ("SIGTERM", "evaluate.py run", ()),
        ("SIGHUP", "merge_lora.py run out --images photos", ()),
        ("SIGTERM", "make_cut_paste.py --out out data=cityscapes data.root=city data/cut_paste=toy", ()),
        ("SIGINT", "dataset_report.py DATA --out out", ()),
        ("SIGTERM", "inspect_model.py run --json facts.json", ()),
        ("SIGTERM", ANOMALY, ()),
        ("SIGTERM", "compare.py report run", ()),
        ("SIGTERM", "TRAIN", LOGS),
        ("SIGHUP", "TRAIN LORA", LOGS),
    ]
]
TABLE = {
    "signals": SIGNALS,
    "images": IMAGES,
    "labels": LABELS,
    "archives": ARCHIVES,
    "configurations": CONFIGURATIONS,
    "files of settings": FILES_OF_SETTINGS,
    "checkpoints": CHECKPOINTS,
    "adapters": ADAPTERS,
    "outputs": OUTPUTS,
    "environment": ENVIRONMENT,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The folder that each case gets a copy of, and a run in it."""
    root = tmp_path_factory.mktemp("world")
    bad.make_world(root)
    before = os.getcwd()
    os.chdir(root)
    try:
        assert train_with_lora.main([*bad.DATA, *bad.NET, *bad.ALIASES["LORA"], "output_dir=run"]) == 0
    finally:
        os.chdir(before)
    return root


@pytest.fixture
def here(world, tmp_path, monkeypatch):
    """A copy of the world, which is the working directory."""
    place = tmp_path / "here"
    shutil.copytree(world, place)
    for name in ("config.yaml", "summary.json"):
        file = place / "run" / name
        file.write_text(file.read_text().replace(str(world), str(place)))
    monkeypatch.chdir(place)
    monkeypatch.setenv("EOMT_CACHE", str(world.parent / "cache"))
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return place


def listing(place):
    """Every file with the hash of its content, every link with its target, every folder."""
    found = {}
    for folder, folders, files in os.walk(place):
        for name in (*folders, *files):
            path = Path(folder, name)
            key = str(path.relative_to(place)) + "/" * path.is_dir()
            found[key] = (
                os.readlink(path)
                if path.is_symlink()
                else path.is_dir() or hashlib.sha256(path.read_bytes()).hexdigest()
            )
    return found


def call(command):
    """The exit code of a command line, in this process."""
    script, *words = [part for word in shlex.split(command) for part in bad.ALIASES.get(word, [word])]
    main = train_with_lora.main if script == "train_with_lora.py" else importlib.import_module(script[:-3]).main
    try:
        return main(words)
    except SystemExit as ended:  # of argparse
        return ended.code


@pytest.mark.parametrize(
    ("kind", "case"),
    [(kind, case) for kind, cases in TABLE.items() for case in cases],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_a_bad_input_is_answered_in_a_sentence(kind, case, here, monkeypatch, capfd):
    if case.spoil:
        case.spoil(here)
    for name, value in case.env.items():
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    before = listing(here)
    if case.how:
        case.how(monkeypatch)
    threads = set(threading.enumerate())
    code = call(case.command)
    for thread in {each for each in threading.enumerate() if not each.daemon} - threads:  # as the interpreter does
        thread.join(30)
    monkeypatch.undo()
    out, err = capfd.readouterr()
    errors = [line for line in err.splitlines() if "error: " in line]
    print(code, out[-500:], err[-3000:])
    assert code == case.code and "Traceback" not in out + err
    ended = code > 128  # by a signal
    assert len(errors) == (code > 0 and not case.finding and not ended) and all(len(line) < 1500 for line in errors)
    assert re.search(case.says, out + err)
    after = listing(here)
    changed = {name for name in after.keys() | before.keys() if after.get(name) != before.get(name)}
    stray = {
        name
        for name in changed
        if not name.endswith("/") and not any(fnmatch.fnmatch(name, each) for each in case.leaves)
    }
    drafts = {name for name in changed if re.search(r"(^|/)\.(?!hydra|lock)", name) or ".part" in name}
    assert not stray and not drafts
