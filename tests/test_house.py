"""Who may import whom, and what a plain import needs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = [ROOT / "train_with_lora.py", *sorted(ROOT.glob("lora_*.py")), *sorted((ROOT / "eomt").rglob("*.py"))]
FORBIDDEN = {  # folder or file: what it must not import
    "eomt/models": (
        "lightning",
        "hydra",
        "omegaconf",
        "peft",
        "eomt.training",
        "eomt.data",
        "lora_config",
        "lora_audit",
    ),
    "eomt/data": ("eomt.models", "eomt.training", "hydra", "omegaconf"),
    "eomt/training": ("hydra", "omegaconf"),
    "eomt": ("hydra", "train_with_lora", "scripts"),
    "lora_config.py": ("lightning", "hydra", "omegaconf", "eomt", "timm"),
    "lora_audit.py": ("lightning", "hydra", "omegaconf", "eomt", "timm"),
}
OF_DATA_FOR_TRAINING = {"eomt.data.labels"}
LONG = 5  # lines of a public function from which on it needs a docstring
OPTIONAL = ("wandb", "matplotlib", "transformers", "peft")


def imports(source):
    """Every module that the source imports, at the top, inside functions and for type checking."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where a name comes from"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_inside(module, package):
    return module == package or module.startswith(f"{package}.")


def broken(source, forbidden):
    return sorted({package for module in imports(source) for package in forbidden if is_inside(module, package)})


def names(path):
    return path.relative_to(ROOT).as_posix()


def test_every_import_form_is_seen():
    source = (
        "import hydra.utils\ndef f():\n    from eomt import data\n    import peft as p\nfrom lightninglike import x"
    )
    assert broken(source, ("hydra", "eomt.data", "peft", "lightning")) == ["eomt.data", "hydra", "peft"]


@pytest.mark.parametrize("room", FORBIDDEN)
def test_rooms_import_only_what_they_may(room):
    files = [path for path in FILES if names(path) == room or names(path).startswith(f"{room}/")]
    assert files
    found = {names(path): broken(path.read_text(), FORBIDDEN[room]) for path in files}
    assert not {name: packages for name, packages in found.items() if packages}


def test_training_takes_nothing_but_labels_from_data():
    for path in (ROOT / "eomt" / "training").glob("*.py"):
        modules = {module for module in imports(path.read_text()) if is_inside(module, "eomt.data")}
        assert all(any(is_inside(m, allowed) for allowed in OF_DATA_FOR_TRAINING) for m in modules), names(path)


def test_nothing_takes_a_hydra_configuration_but_the_entry_points():
    for path in FILES:
        if path.name == "train_with_lora.py":
            continue
        arguments = {
            arg.arg
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.arguments)
            for arg in (*node.args, *node.kwonlyargs)
        }
        assert "cfg" not in arguments, names(path)


def test_a_plain_import_needs_none_of_the_optional_packages():
    paths = [names(path) for path in FILES]  # those without Lightning, which imports some of these packages itself
    light = [name for name in paths if "/" not in name or name.startswith(("eomt/models/", "eomt/command_line"))]
    modules = [name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in light]
    code = f"import sys\nfor name in {OPTIONAL!r}: sys.modules[name] = None\nimport eomt, importlib\n"
    code += f"for name in {modules!r}: importlib.import_module(name)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]


def public_functions(path):
    """Functions and methods without a leading underscore, by name; those inside other functions are nobody's API."""

    def walk(node, prefix):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef) and not child.name.startswith("_"):
                yield from walk(child, f"{prefix}{child.name}.")
            elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) and not child.name.startswith("_"):
                yield f"{prefix}{child.name}", child

    yield from walk(ast.parse(path.read_text()), f"{names(path)}: ")


HOOKS_OF_LIGHTNING = ("on_", "training_step", "validation_step", "configure_optimizers", "setup", "state_dict")


def is_hook(name):
    return name.split(": ")[1].count(".") == 1 and name.split(".")[-1].startswith(HOOKS_OF_LIGHTNING)


@pytest.mark.parametrize("path", FILES, ids=names)
def test_public_functions_have_type_hints_and_longer_ones_a_docstring(path):
    problems = []
    for name, function in public_functions(path):
        arguments = [a for a in (*function.args.args, *function.args.kwonlyargs) if a.arg not in ("self", "cls")]
        if "# noqa: ANN001" not in path.read_text().splitlines()[function.lineno - 1]:
            problems += [f"{name}: {a.arg} has no type hint" for a in arguments if a.annotation is None]
        if function.returns is None:
            problems.append(f"{name} has no return type")
        lines = sum(statement.end_lineno - statement.lineno + 1 for statement in function.body)
        if lines > LONG and not ast.get_docstring(function) and not is_hook(name):
            problems.append(f"{name} has {lines} lines and no docstring")
    assert not problems
