import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from eomt.files import (
    cache_folder,
    new_folder,
    read_json,
    read_yaml,
    replacing,
    replacing_files,
    replacing_folder,
    write_json,
    write_text,
)


def killed(code: str, folder: Path) -> None:
    """Runs code in a process that kills itself."""
    lines = f"import os, signal\nfrom pathlib import Path\nfrom eomt.files import *\nfolder = Path({str(folder)!r})\n"
    ran = subprocess.run([sys.executable, "-c", lines + code], cwd=Path(__file__).parents[1], capture_output=True)
    assert ran.returncode == -signal.SIGKILL, ran.stderr.decode()


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_file_is_replaced_as_a_whole(tmp_path):
    write_json(tmp_path / "new" / "facts.json", {"a": 1})
    write_json(tmp_path / "new" / "facts.json", {"a": [2]})
    assert read_json(tmp_path / "new" / "facts.json") == {"a": [2]}
    assert (tmp_path / "new" / "facts.json").read_text() == '{\n  "a": [\n    2\n  ]\n}\n'
    assert os.listdir(tmp_path / "new") == ["facts.json"]


def test_numbers_that_json_lacks_are_written_as_null(tmp_path):
    write_json(tmp_path / "a.json", {"a": float("nan"), "b": [1.5, (float("inf"),)], "c": {"d": -float("inf")}})
    text = (tmp_path / "a.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"a": None, "b": [1.5, [None]], "c": {"d": None}}


def test_a_draft_that_fails_leaves_the_earlier_file_and_nothing_else(tmp_path):
    write_text(tmp_path / "a.txt", "earlier")
    with pytest.raises(ZeroDivisionError), replacing(tmp_path / "a.txt") as draft:
        draft.write_text("half")
        _ = 1 / 0
    assert (tmp_path / "a.txt").read_text() == "earlier"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_process_killed_before_the_rename_leaves_the_earlier_file(tmp_path):
    write_text(tmp_path / "a.json", "{}")
    killed(
        "with replacing(folder / 'a.json') as d: d.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)", tmp_path
    )
    assert read_json(tmp_path / "a.json") == {}
    assert list(tmp_path.glob("*.json")) == [tmp_path / "a.json"]  # the draft is not taken for a file of its kind
    write_json(tmp_path / "a.json", {"b": 1})
    assert read_json(tmp_path / "a.json") == {"b": 1}


def test_a_process_killed_before_the_rename_leaves_the_earlier_folder(tmp_path):
    for content in ("first", "earlier"):
        with replacing_folder(tmp_path / "adapter") as draft:
            (draft / "weights").write_text(content)
    killed(
        "with replacing_folder(folder / 'adapter') as d: (d / 'w').touch(); os.kill(os.getpid(), signal.SIGKILL)",
        tmp_path,
    )
    assert os.listdir(tmp_path / "adapter") == ["weights"]
    assert (tmp_path / "adapter" / "weights").read_text() == "earlier"
    with replacing_folder(tmp_path / "adapter") as draft:
        (draft / "new").touch()
    assert os.listdir(tmp_path / "adapter") == ["new"]
    assert os.listdir(tmp_path) == ["adapter"]


def test_files_that_belong_together_are_replaced_together_or_not_at_all(tmp_path):
    for name in ("a", "b", "other"):
        write_text(tmp_path / name, "earlier")
    with pytest.raises(ZeroDivisionError), replacing_files(tmp_path) as drafts:
        (drafts / "a").write_text("new")
        _ = 1 / 0
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == dict.fromkeys("a b other".split(), "earlier")
    with replacing_files(tmp_path) as drafts:
        (drafts / "a").write_text("new")
        (drafts / "b").write_text("new")
    found = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert found == {"a": "new", "b": "new", "other": "earlier"}


def test_of_two_processes_that_make_a_new_folder_the_faster_one_has_made_it(tmp_path):
    with new_folder(tmp_path / "toys") as slow, new_folder(tmp_path / "toys") as fast:
        (slow / "scene").write_text("slow")
        (fast / "scene").write_text("fast")
    assert (tmp_path / "toys" / "scene").read_text() == "fast"
    assert os.listdir(tmp_path) == ["toys"]


def test_the_only_writer_of_a_file_removes_the_drafts_of_killed_ones(tmp_path):
    killed("with replacing(folder / 'a[1]') as d: d.touch(); os.kill(os.getpid(), signal.SIGKILL)", tmp_path)
    assert len(os.listdir(tmp_path)) == 1
    with replacing(tmp_path / "a[1]", alone=True) as draft:
        draft.touch()
    assert os.listdir(tmp_path) == ["a[1]"]


def test_a_folder_set_aside_by_a_killed_writer_comes_back(tmp_path):
    (tmp_path / ".adapter.part" / "earlier").mkdir(parents=True)
    (tmp_path / ".adapter.part" / "earlier" / "weights").touch()
    with pytest.raises(ZeroDivisionError), replacing_folder(tmp_path / "adapter"):
        _ = 1 / 0
    assert os.listdir(tmp_path / "adapter") == ["weights"]


def test_files_have_the_mode_that_the_umask_says_whatever_writes_them(tmp_path):
    before = os.umask(0o027)
    try:
        with replacing(tmp_path / "a.safetensors") as draft:
            save_file({"a": torch.zeros(1)}, draft)
        with replacing_folder(tmp_path / "model") as folder:
            save_file({"a": torch.zeros(1)}, folder / "model.safetensors")
    finally:
        os.umask(before)
    assert mode(tmp_path / "a.safetensors") == mode(tmp_path / "model" / "model.safetensors") == 0o640
    assert mode(tmp_path / "model") == 0o750


def test_libraries_that_look_at_the_ending_write_the_draft(tmp_path):
    with replacing(tmp_path / "counts.npz") as draft:
        np.savez_compressed(draft, confusion=np.ones(2))
    assert np.load(tmp_path / "counts.npz")["confusion"].tolist() == [1, 1]


@pytest.mark.parametrize("read", [read_json, read_yaml])
@pytest.mark.parametrize(("content", "problem"), [('{"a": [1', "cannot be read"), ("[1, 2]", "holds a list")])
def test_a_broken_file_is_named(tmp_path, read, content, problem):
    (tmp_path / "facts").write_text(content)
    with pytest.raises(ValueError, match=rf"{tmp_path}/facts {problem}"):
        read(tmp_path / "facts")


@pytest.mark.parametrize("read", [read_json, read_yaml])
def test_a_missing_file_is_the_default_or_is_named(tmp_path, read):
    assert read(tmp_path / "facts", None) is None
    with pytest.raises(FileNotFoundError, match=rf"{tmp_path}/facts is missing"):
        read(tmp_path / "facts")


def test_an_empty_yaml_file_says_nothing(tmp_path):
    (tmp_path / "a.yaml").touch()
    assert read_yaml(tmp_path / "a.yaml") == {}


def test_caches_are_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("EOMT_CACHE", str(tmp_path))
    assert cache_folder("trunk") == tmp_path / "trunk"
    monkeypatch.delenv("EOMT_CACHE")
    assert cache_folder("trunk") == Path.home() / ".cache" / "eomt" / "trunk"


def test_files_need_no_torch():
    code = "import sys, eomt.files; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=True)


@pytest.mark.parametrize("words", ['".jpeg"', 'environ.get("EOMT_CACHE")', "json.dump(", "mkdtemp", ".savefig(path"])
def test_nobody_else_in_the_package_has_endings_caches_or_drafts_of_its_own(words):
    package = Path(__file__).parents[1] / "eomt"
    found = {path.relative_to(package).as_posix() for path in package.rglob("*.py") if words in path.read_text()}
    assert found <= {"files.py"}


def test_an_error_between_the_renames_puts_the_earlier_folder_back(tmp_path, monkeypatch):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "weights").write_text("old")
    rename = Path.rename

    def fails(path, target):
        if Path(target) == tmp_path / "adapter" and path.name == "adapter":
            raise OSError("no more")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(OSError, match="no more"), replacing_folder(tmp_path / "adapter") as draft:
        (draft / "weights").write_text("new")
    assert (tmp_path / "adapter" / "weights").read_text() == "old" and os.listdir(tmp_path) == ["adapter"]


@pytest.mark.parametrize("library", ["python", "torch", "safetensors"])
def test_a_full_disk_names_the_file_what_it_needs_and_what_is_free(tmp_path, library):
    """In a process whose files cannot grow, as on a full disk; libraries have errors of their own for it."""
    write = {
        "python": "draft.write_bytes(bytes(2**22))",
        "torch": "__import__('torch').save(bytes(2**22), draft)",
        "safetensors": "__import__('safetensors.numpy').numpy.save_file({'a': numpy.zeros(2**22)}, draft)",
    }[library]
    code = (
        "import resource, shutil, signal, sys, numpy\nfrom collections import namedtuple\n"
        "from eomt import files\nfrom eomt.files import *\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\nresource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))\n"
        "usage = namedtuple('usage', 'total used free')\n"
        "files.shutil = namedtuple('shutil', 'disk_usage rmtree')(lambda _: usage(0, 0, 0), shutil.rmtree)\n"
        "try:\n    with replacing(sys.argv[1]) as draft: " + write + "\n"
        "except OSError as error: print(error)"
    )
    target = tmp_path / "last.ckpt"
    target.write_text("earlier")
    ran = subprocess.run(
        [sys.executable, "-c", code, target], cwd=Path(__file__).parents[1], capture_output=True, text=True
    )
    assert ran.stdout.startswith(f"there is no room for {target}: more than "), ran.stdout + ran.stderr
    assert "iB are free there; delete something, or choose a folder on another disk" in ran.stdout
    assert target.read_text() == "earlier" and os.listdir(tmp_path) == ["last.ckpt"]
