"""Who may import whom, and what a plain import needs."""

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = [ROOT / "train_with_lora.py", ROOT / "lora_config.py", *sorted((ROOT / "eomt").rglob("*.py"))]
SCRIPTS = sorted((ROOT / "scripts").glob("*.py"))
ORDER = (  # a room may import those that stand before it; README shows the same tree
    "eomt.places",
    "eomt.suggestions",
    "eomt.command_line",
    "eomt.flags",
    "eomt.files",
    "eomt.processes",
    "eomt.indices",
    "eomt.fingerprints",
    "eomt.targets",
    "lora_config",
    "eomt.lora",
    "eomt.settings",
    "eomt.models",
    "eomt.toys",
    "eomt.data",
    "eomt.inference",
    "eomt.anomaly",
    "eomt.training",
    "eomt.exchange",
    "eomt.cost",
    "eomt.reporting",
    "eomt.comparison",
    "eomt.diagnosis",
    "eomt.launch",
    "train_with_lora",
    "eomt.cli",
)
FORBIDDEN = {  # room: libraries, and rooms before it, that it must not import
    "lora_config": ("lightning", "hydra", "omegaconf", "timm", "eomt.command_line", "eomt.files", "eomt.indices"),
    "eomt.lora": ("lightning", "hydra", "omegaconf", "timm"),
    "eomt.models": ("lightning", "hydra", "omegaconf", "peft", "lora_config", "eomt.lora"),
    "eomt.data": ("hydra", "omegaconf", "peft", "lora_config", "eomt.lora", "eomt.models"),
    "eomt.training": ("hydra", "omegaconf", "eomt.data"),
    "eomt": ("scripts", "unittest"),  # nothing is patched
}
COMPOSES = (  # and nobody else knows Hydra
    "eomt.settings.compose",
    "eomt.settings.hydra_section",
    "eomt.settings.sweeps",
    "eomt.comparison.cells",
    "eomt.comparison.matrix",
    "eomt.comparison.tuning",
)
WITHOUT_TORCH = (
    "eomt.places",
    "eomt.cli",
    "eomt.command_line",
    "eomt.flags",
    "eomt.files",
    "eomt.processes",
    "eomt.indices",
    "lora_config",
    "eomt.settings",
)
HEAVY = ("torch", "timm", "lightning", "peft", "torchvision", "torchmetrics", "matplotlib")
LINES, FUNCTION_LINES = 400, 60
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


def module(path):
    return names(path).removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def room(name):
    """The entry of ORDER that a module belongs to; None for the package itself and for what is not ours."""
    return next((entry for entry in ORDER if is_inside(name, entry)), None)


def upward(name, source):
    """What a module imports from rooms that do not stand before its own."""
    own = ORDER.index(room(name))
    found = {imported for imported in imports(source) if room(imported) and ORDER.index(room(imported)) > own}
    return sorted({room(imported) for imported in found})


def test_every_import_form_is_seen():
    source = (
        "import hydra.utils\ndef f():\n    from eomt import data\n    import peft as p\nfrom lightninglike import x"
    )
    assert broken(source, ("hydra", "eomt.data", "peft", "lightning")) == ["eomt.data", "hydra", "peft"]


def test_an_import_of_a_higher_room_is_seen_also_for_type_hints():
    source = "if TYPE_CHECKING:\n    from eomt.training import callbacks\nfrom eomt.models.vit import ViT"
    assert upward("eomt.inference.windows", source) == ["eomt.training"]


def test_every_file_has_a_place_in_the_order():
    assert not [name for name in map(module, FILES) if name != "eomt" and room(name) is None]


def test_rooms_import_only_rooms_that_stand_before_them():
    found = {module(path): upward(module(path), path.read_text()) for path in FILES if module(path) != "eomt"}
    assert not {name: rooms for name, rooms in found.items() if rooms}


def test_no_two_files_know_each_other_in_a_circle():
    known = {module(path) for path in (*FILES, *SCRIPTS)}
    graph = {module(path): known & set(imports(path.read_text())) - {module(path)} for path in (*FILES, *SCRIPTS)}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the files


@pytest.mark.parametrize("place", FORBIDDEN)
def test_rooms_import_nothing_that_they_must_not_know(place):
    files = [path for path in FILES if is_inside(module(path), place)]
    assert files
    found = {names(path): broken(path.read_text(), FORBIDDEN[place]) for path in files}
    assert not {name: packages for name, packages in found.items() if packages}


def test_the_package_knows_hydra_only_where_configurations_are_composed():
    found = {module(path) for path in FILES if broken(path.read_text(), ("hydra", "omegaconf"))}
    assert found - {"train_with_lora"} == set(COMPOSES)


def test_settings_are_imported_without_torch():
    light = [module(path) for path in FILES if room(module(path)) in WITHOUT_TORCH]
    code = f"import sys\nfor name in {HEAVY!r}: sys.modules[name] = None\nimport importlib\n"
    code += f"for name in {light!r}: importlib.import_module(name)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]


def test_readme_shows_every_room():
    text = (ROOT / "README.md").read_text()
    places = [entry.replace(".", "/") for entry in ORDER]
    missing = [place for place in places if not any(f"    {place}{end}" in text for end in ("/ ", ".py "))]
    assert not missing


@pytest.mark.parametrize("path", [*FILES, *SCRIPTS], ids=names)
def test_files_and_functions_are_short(path):
    source = path.read_text()
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    long = {f.name: f.end_lineno - f.lineno + 1 for f in functions if f.end_lineno - f.lineno >= FUNCTION_LINES}
    assert source.count("\n") <= LINES and not long


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


def test_every_test_that_the_page_of_faults_names_is_there():
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs" / "faults.md").read_text()))
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    assert len(named) > 50 and not [name for name in sorted(named) if f"def {name}(" not in tests]
