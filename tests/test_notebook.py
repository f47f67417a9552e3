"""The notebook and the Python of the README, run as they stand."""

import os
import re

import pytest
import warm
import yaml
from conftest import ROOT
from PIL import Image


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """`eomt` in the PATH, which starts with the libraries imported."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "main.py").write_text("import sys\nfrom eomt.cli import main\nsys.exit(main())\n")
    (folder / "eomt").write_text(f'#!/bin/sh\nexec "{warm.python()}" "{folder}/main.py" "$@"\n')
    (folder / "eomt").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def test_the_notebook_runs_from_top_to_bottom(commands, tmp_path):
    nbformat = pytest.importorskip("nbformat", reason="nbclient is not installed")
    from nbclient import NotebookClient

    notebook = nbformat.read(ROOT / "examples" / "own_data.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "outputs are not kept in the repository"
    notebook.cells = [cell for cell in notebook.cells if "install" not in cell.metadata.get("tags", [])]
    for cell in notebook.cells:  # one epoch shows that it runs
        cell.source = cell.source.replace("max_epochs=15 trainer.check_val_every_n_epoch=5", "max_epochs=1")
    NotebookClient(notebook, timeout=250, resources={"metadata": {"path": tmp_path}}).execute()
    said = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))

    assert "error:" not in said and "Traceback" not in said, said[-3000:]
    for name in ("lora/samples/kept.png", "matrix/report/report.html", "predictions", "merged/model.safetensors"):
        assert (tmp_path / name).exists(), said[-3000:]


def test_ten_lines_of_python_train_and_save_an_adapter(tmp_path, monkeypatch):
    section = (ROOT / "README.md").read_text().split("## In Python")[1]
    code = re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]
    assert len([line for line in code.splitlines() if line.strip() and not line.startswith(("import", "from"))]) <= 10
    tiny = {"backbone_name": "vit_tiny_patch16_224", "backbone_kwargs": {"embed_dim": 64, "depth": 3, "num_heads": 2}}
    code = re.sub(
        r"backbone = .*", f"backbone = {tiny | {'pretrained': False, 'num_blocks': 2, 'num_points': 64}}", code
    )
    code = code.replace("(512, 512)", "(64, 64), num_workers=0", 1).replace("(512, 512)", "(64, 64)")
    code = code.replace("max_epochs=50", "max_epochs=1, accelerator='cpu', logger=False, enable_checkpointing=False")
    for folder, value in (("photos", 90), ("masks", 1)):
        (tmp_path / folder).mkdir()
        for index in range(10):
            Image.new("L", (80, 70), value if folder == "photos" else index % 2).save(
                tmp_path / folder / f"{index}.png"
            )
    classes = [{"name": name, "color": [k, 0, 0], "ids": [k]} for k, name in enumerate(("road", "sky"))]
    (tmp_path / "classes.yaml").write_text(yaml.safe_dump({"classes": classes}))
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code, names)
    assert names["module"].class_names == ["road", "sky"] and names["trainer"].callbacks[0].audit.results
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
