"""The hub: what is loaded from there is pinned to a commit, and what is sent there tells nothing private."""

import json
import logging
import shutil
from fnmatch import fnmatch
from threading import Event

import huggingface_hub
import pytest
import torch
from conftest import TINY
from huggingface_hub import constants
from omegaconf import OmegaConf

from eomt.inference.saved import find_artefact, results_of
from eomt.models.vit import ViT
from eomt.settings import hub
from eomt.settings.compose import absolute_paths
from eomt.settings.hub import hub_place, local_path, named_on_hub, pinned
from eomt.settings.model import ModelSettings
from eomt.training.mask_classification_semantic import MaskClassificationSemantic

FIRST, SECOND = "a" * 40, "b" * 40


class Hub:
    """Stands in for the hub: repositories are folders `user/name/COMMIT`; it notes what it was asked."""

    def __init__(self, root):
        self.root, self.asked, self.branches = root, [], {"main": FIRST}

    def fill(self, repo, folder, commit=FIRST):
        shutil.copytree(folder, self.root / repo / commit)

    def repo_info(self, repo, revision=None):
        self.asked.append(("info", repo, revision))
        if not (self.root / repo).is_dir():
            raise huggingface_hub.errors.HFValidationError("404: no such repository")
        return type("Info", (), {"sha": self.branches[revision or "main"]})

    def download(self, repo, file, revision=None):
        self.asked.append(("file", file, revision))
        if not (self.root / repo / revision / file).is_file():
            raise huggingface_hub.errors.HFValidationError(f"404: {file}")
        return str(self.fetch(repo, revision, [file]) / file)

    def snapshot(self, repo, revision=None, allow_patterns=None):
        self.asked.append(("folder", tuple(allow_patterns), revision))
        return str(self.fetch(repo, revision, allow_patterns))

    def fetch(self, repo, revision, patterns):
        """Only what is asked for comes into the cache, as with the hub's own client."""
        there, cache = self.root / repo / revision, self.root / "cache" / repo / revision
        for file in (file for file in there.rglob("*") if file.is_file()):
            name = file.relative_to(there).as_posix()
            if any(fnmatch(name, pattern) for pattern in patterns):
                (cache / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, cache / name)
        return cache


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    there = Hub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: there)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", there.download)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", there.snapshot)
    monkeypatch.chdir(tmp_path)
    for cached in (hub._commit, hub._fetched):
        cached.cache_clear()
    yield there
    for cached in (hub._commit, hub._fetched):
        cached.cache_clear()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A whole network, and an adapter on it."""
    folder = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    MaskClassificationSemantic(**TINY).save_pretrained(folder / "model")
    MaskClassificationSemantic(**TINY, use_lora=True, ckpt_path=str(folder / "model")).save_pretrained(
        folder / "adapter"
    )
    return folder


def outputs(module):
    image = torch.rand(1, 3, 64, 128, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), module.eval().network.deployed():
        return torch.cat([part.flatten() for parts in module.network(image) for part in parts])


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("hf://user/name/model.safetensors", ("user/name", None, "model.safetensors")),
        ("hf:/user/name@v1/a/model.bin", ("user/name", "v1", "a/model.bin")),
        (f"hf://user/na.me@{FIRST}", ("user/na.me", FIRST, None)),
        ("/data/model", None),
        ("user/name", None),
        (None, None),
    ],
)
def test_a_place_on_the_hub_is_read_in_its_parts(text, parts):
    assert hub_place(text) == parts
    if parts:
        assert hub_place(str(hub_place(text))) == parts


@pytest.mark.parametrize(
    "text", ["hf://name", "hf://user/name/../x", "hf:user", "hf://user/name//x", "hf://u/n@/x", "hf://u/n x"]
)
def test_what_is_no_place_on_the_hub_is_refused_with_the_form_it_should_have(text):
    with pytest.raises(ValueError, match="hf://user/name@revision/file is meant"):
        hub_place(text)


def test_what_is_here_or_lies_in_a_folder_that_is_here_is_never_asked_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs").mkdir()
    for path in ("outputs/lora", "outputs", "model.ckpt", "/user/name", "a/b/c", "../user/name"):
        assert named_on_hub(path) is None
    assert named_on_hub("user/name@v1") == ("user/name", "v1", None)
    with pytest.raises(FileNotFoundError, match="outputs/lora: no such file or folder"):
        find_artefact("outputs/lora")


def test_a_network_is_opened_from_the_hub_and_says_the_commit(stand_in, saved):
    stand_in.fill("user/name", saved / "model")
    module = MaskClassificationSemantic.from_pretrained("user/name")
    assert module.source == f"hf://user/name@{FIRST}"
    assert torch.equal(outputs(module), outputs(MaskClassificationSemantic.from_pretrained(saved / "model")))
    assert [what for what, *_ in stand_in.asked].count("info") == 1  # one process sees one commit
    assert all(revision == FIRST for what, _, revision in stand_in.asked if what != "info")
    (patterns,) = {patterns for what, patterns, _ in stand_in.asked if what == "folder"}
    assert "*.py" not in patterns and "*" not in patterns  # nothing that could run
    for form in (f"user/name@{FIRST}", f"hf://user/name@{FIRST}"):
        stand_in.asked.clear()
        MaskClassificationSemantic.from_pretrained(form)
        assert "info" not in [what for what, *_ in stand_in.asked]  # a commit needs no question


def test_training_starts_from_a_file_of_the_hub_and_its_records_hold_the_commit(stand_in, saved, tmp_path):
    stand_in.fill("user/name", saved / "model")
    place, commit = "hf://user/name/model.safetensors", f"hf://user/name@{FIRST}/model.safetensors"
    config = OmegaConf.create({"model": {"ckpt_path": place, "backbone_weights": None}})
    absolute_paths(config)
    assert config.model.ckpt_path == commit
    module = MaskClassificationSemantic(**TINY, use_lora=True, ckpt_path=place)
    assert module.hparams.ckpt_path == commit
    module.save_pretrained(tmp_path / "adapter")
    stand_in.branches["main"] = SECOND  # what the branch is later does not matter
    opened = MaskClassificationSemantic.from_pretrained(tmp_path / "adapter")
    assert opened.hparams.ckpt_path == commit and torch.equal(outputs(opened), outputs(module))


def test_the_base_of_an_adapter_may_lie_on_the_hub(stand_in, saved):
    stand_in.fill("user/base", saved / "model")
    module = MaskClassificationSemantic.from_pretrained(saved / "adapter", "hf://user/base@main")
    assert module.hparams.ckpt_path == f"hf://user/base@{FIRST}"
    stand_in.fill("user/other", saved / "adapter")
    with pytest.raises(ValueError, match="is an adapter"):
        MaskClassificationSemantic.from_pretrained(saved / "adapter", "hf://user/other")


def test_a_plain_backbone_from_the_hub_is_recognised_without_torch(stand_in, saved):
    stand_in.fill("user/name", saved / "model")
    with pytest.raises(ValueError, match=r"whole EoMT.*model\.ckpt_path"):
        ModelSettings(
            **TINY | {"backbone_name": None, "backbone_kwargs": None},
            backbone_weights="hf://user/name/model.safetensors",
        )


def test_what_the_hub_does_not_give_is_one_sentence(stand_in, saved):
    with pytest.raises(FileNotFoundError, match=r"nobody/nothing: no such file or folder, and .* the hub"):
        MaskClassificationSemantic.from_pretrained("nobody/nothing")
    with pytest.raises(ConnectionError, match="hf://nobody/nothing could not be had"):
        pinned("hf://nobody/nothing")
    stand_in.fill("user/name", saved / "model")
    with pytest.raises(ConnectionError, match=r"hf://user/name@a+/absent\.bin could not be had"):
        local_path("hf://user/name/absent.bin")


def test_results_of_a_network_on_the_hub_need_a_folder(stand_in):
    with pytest.raises(ValueError, match="--output"):
        results_of("user/name", "evaluation")


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """A folder of transformers' EoMT on DINOv3, with pixels and norms of its own."""
    programs = pytest.importorskip("test_other_programs")
    folder = tmp_path_factory.mktemp("theirs")
    programs.theirs_of(programs.DINOV3).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.25] * 3}))
    return folder, programs.settings_of(programs.DINOV3)


@pytest.mark.parametrize("place", ["hf://user/name/a/model.safetensors", "hf://user/name/a"])
def test_what_stands_beside_a_file_on_the_hub_holds_for_it_as_in_its_folder(place, stand_in, theirs):
    folder, settings = theirs
    stand_in.fill("user/name", folder, f"{FIRST}/a")
    module = MaskClassificationSemantic(**settings, ckpt_path=place)
    assert module.network.encoder.norm.eps == 1e-6 and (module.network.encoder.pixel_mean == 0.5).all()
    with pytest.raises(ValueError, match="has num_heads 3, the configuration says 2"):
        kwargs = settings["backbone_kwargs"] | {"num_heads": 2}
        MaskClassificationSemantic(**settings | {"backbone_kwargs": kwargs}, ckpt_path=place)


def test_the_log_says_the_commit_once_and_where_on_the_hub_the_weights_are(stand_in, saved, caplog):
    stand_in.fill("user/name", saved / "model")
    with caplog.at_level(logging.INFO):
        MaskClassificationSemantic(**TINY, ckpt_path="hf://user/name/model.safetensors")
    assert caplog.text.count("is commit") == 1
    assert f"CHECKPOINT hf://user/name@{FIRST}/model.safetensors" in caplog.text


@pytest.mark.parametrize("name", ["user/name", "hf://user/name"])
def test_a_network_on_the_hub_is_converted(name, stand_in, saved, tmp_path, call_script):
    stand_in.fill("user/name", saved / "model")
    assert call_script("convert.py", name, tmp_path / "out", "--to", "eomt")[0] == 0
    one, other = (MaskClassificationSemantic.from_pretrained(path) for path in (tmp_path / "out", saved / "model"))
    assert torch.equal(outputs(one), outputs(other))
    code, error = call_script("convert.py", "nobody/nothing", tmp_path / "new", "--to", "eomt")
    assert code == 1 and "nobody/nothing: no such file or folder, and hf://nobody/nothing could not be had" in error


def test_the_base_that_an_adapter_of_peft_names_is_had_from_the_hub(stand_in, tmp_path, call_script):
    import peft
    from test_other_programs import REGISTERS, theirs_of

    base = theirs_of(REGISTERS)
    base.save_pretrained(tmp_path / "base")
    stand_in.fill("user/base", tmp_path / "base")
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    adapted.peft_config["default"].base_model_name_or_path = "user/base"
    adapted.save_pretrained(tmp_path / "peft")
    for out, more in (("named", ()), ("given", ("--ckpt_path", "hf://user/base"))):
        code, error = call_script("convert.py", tmp_path / "peft", tmp_path / out, "--to", "adapter", *more)
        assert code == 0, error
        module = MaskClassificationSemantic.from_pretrained(tmp_path / out)
        assert module.hparams.ckpt_path == f"hf://user/base@{FIRST}"


@pytest.fixture
def nobody_answers(monkeypatch):
    """A hub at an address of this machine where nobody listens, which the client may ask."""
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")


def test_a_hub_that_does_not_answer_is_given_up_with_one_sentence(nobody_answers, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    asked = []
    monkeypatch.setattr("time.sleep", lambda seconds: asked.append(seconds))  # as before a further attempt
    with pytest.raises(
        ConnectionError, match=r"could not be loaded \(the hub does not answer, or HF_HUB_OFFLINE is set"
    ):
        ViT([64, 64], backbone_name="vit_small_patch14_reg4_dinov2")
    with pytest.raises(ConnectionError, match=r"hf://user/name@main could not be had from the hub"):
        local_path("hf://user/name@main")
    assert not asked and not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert not constants.HF_HUB_OFFLINE, "it is asked again next time"


def test_a_name_that_is_looked_up_for_ever_is_waited_for_no_longer_than_that(monkeypatch):
    monkeypatch.setattr(hub, "SECONDS", 0.05)
    ended = Event()

    def never(*args):
        ended.wait(20)
        raise OSError

    monkeypatch.setattr(hub.socket, "create_connection", never)
    assert not hub._answers("https://hub.example")
    ended.set()


def test_behind_a_proxy_only_the_client_can_tell(monkeypatch):
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    assert hub._answers("https://hub.example")
