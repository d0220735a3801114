"""The rules of the house, read from the sources: who imports whom, what the wheel holds, sizes, words, the README."""

import ast
import graphlib
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
ROOTS = ("storm", "data_prep", "launch")

# Module or package -> layer. A module of storm that is neither named here nor inside a package named here has no layer,
# which is an error: whoever adds it says where it belongs.
BASE = (
    "schema", "npz", "genes", "presets", "regions", "store", "index", "shards", "config", "prep_config", "files",
    "commands", "markdown", "counts", "descriptors",
)  # fmt: skip
ABOVE = ("data", "model", "losses", "checkpoints", "train", "export", "inference", "results", "evaluate", "cli")
LAYERS = {
    "storm": "base",  # storm/__init__.py itself
    **{f"storm.{name}": "base" for name in BASE},
    **{f"storm.{name}": name for name in ABOVE},
    "storm.card": "export",  # the card that an export carries
    "storm.prediction": "inference",
    "storm.tile_maps": "inference",
    "data_prep": "data_prep",
    "launch": "launch",
}
PACKAGES = {"storm.data", "storm.model", "storm.train", "storm.evaluate", "data_prep", "launch"}
_MIDDLE = {"base", "data", "model", "losses"}
_UPPER = _MIDDLE | {"checkpoints", "train", "export", "inference"}
MAY_IMPORT = {
    "base": set(),
    "data_prep": {"base"},
    "data": {"base"},
    "model": {"base"},
    "losses": {"base"},
    "checkpoints": {"base"},  # a run's folder: what train writes and export reads, which are blind to each other
    "train": _MIDDLE | {"checkpoints"},
    "export": _MIDDLE | {"checkpoints"},
    "inference": _UPPER - {"inference"},
    "results": _UPPER,
    "evaluate": _UPPER | {"results"},
    "cli": _UPPER | {"results", "evaluate"},
    "launch": _UPPER | {"results", "evaluate", "cli"},
}
MAY_IMPORT_LAZILY = {layer: {"data_prep"} for layer in ("inference", "results", "evaluate", "cli", "launch")}
ONLY_IN = {"deepspeed": "storm.train", "openslide": "data_prep.slides"}  # library -> module or package

TOP_FOLDERS = {"storm", "data_prep", "launch", "configs", "tests", "slurm"}
TOP_FILES = {"setup.cfg", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md"}
MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 60


def module_files() -> dict[str, Path]:
    """Dotted name -> file, of every module of storm, data_prep and launch."""
    found = {}
    for path in sorted(p for root in ROOTS for p in (REPO / root).rglob("*.py")):
        parts = path.relative_to(REPO).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = module_files()


def layer_of(module: str) -> str | None:
    """The layer of a module, or of the nearest package in the table that holds it."""
    if module in LAYERS:
        return LAYERS[module]
    inside = [package for package in PACKAGES if module.startswith(package + ".")]
    return LAYERS[inside[0]] if inside else None


def imports(tree: ast.Module, package: str) -> Iterator[tuple[str, bool, int]]:
    """(dotted name, whether inside a function, line) of each import; `from a import b` gives a.b."""

    def visit(node: ast.AST, lazy: bool) -> Iterator[tuple[str, bool, int]]:
        if isinstance(node, ast.Import):
            yield from ((alias.name, lazy, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            origin = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((f"{origin}.{alias.name}", lazy, node.lineno) for alias in node.names)
        lazy = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, lazy)

    return visit(tree, False)


def imports_of(module: str) -> list[tuple[str, bool, int]]:
    """As `imports`, for one of MODULES; a name that is no module of ours but lies in one is cut to that module."""
    path = MODULES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found = []
    for name, lazy, line in imports(ast.parse(path.read_text()), package):
        parent = name.rpartition(".")[0]
        found.append((parent if name not in MODULES and parent in MODULES else name, lazy, line))
    return found


def forbidden(module: str, target: str, lazy: bool) -> str | None:
    """Why `module` must not import `target`, or None where it may."""
    for library, room in ONLY_IN.items():
        if target.split(".")[0] == library and module != room and not module.startswith(room + "."):
            return f"{library} only in {room}"
    layer = layer_of(module)
    if target.split(".")[0] == "torch" and layer in {"base", "data_prep"}:
        return f"{layer} never sees torch"
    if target.split(".")[0] not in ROOTS or target == "storm":
        return None
    other = layer_of(target)
    if layer == other or other in MAY_IMPORT[str(layer)]:
        return None
    if other in MAY_IMPORT_LAZILY.get(str(layer), set()):
        return None if lazy else f"{layer} imports {other} inside functions only"
    return f"{layer} is blind to {other}"


def test_every_module_has_a_layer() -> None:
    assert [module for module in MODULES if layer_of(module) is None] == []
    assert layer_of("storm.nowhere") is None


def test_imports_point_downward() -> None:
    wrong = [
        f"{MODULES[module].relative_to(REPO)}:{line}: imports {target}: {reason}"
        for module in MODULES
        if layer_of(module)
        for target, lazy, line in imports_of(module)
        if (reason := forbidden(module, target, lazy))
    ]
    assert wrong == []


def test_no_import_circles() -> None:
    graph = {module: {t for t, _, _ in imports_of(module) if t in MODULES and t != module} for module in MODULES}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError naming the circle


@pytest.mark.parametrize(
    ("module", "target", "lazy", "reason"),
    [
        ("storm.schema", "torch", False, "base never sees torch"),
        ("data_prep.build", "torch.nn", True, "data_prep never sees torch"),
        ("data_prep.build", "storm.export", True, "data_prep is blind to export"),
        ("data_prep.build", "storm.schema", False, None),
        ("data_prep.build", "openslide", False, "openslide only in data_prep.slides"),
        ("data_prep.slides", "openslide", False, None),
        ("storm.model.layers", "storm.losses", False, "model is blind to losses"),
        ("storm.model.layers", "storm.model.heads", False, None),
        ("storm.export", "storm.train.engine", True, "export is blind to train"),
        ("storm.export", "deepspeed", True, "deepspeed only in storm.train"),
        ("storm.train.engine", "deepspeed", False, None),
        ("storm.inference", "data_prep.slides", True, None),
        ("storm.inference", "data_prep.slides", False, "inference imports data_prep inside functions only"),
        ("storm.train.trainer", "data_prep.slides", True, "train is blind to data_prep"),
        ("storm.cli", "launch.embed", True, "cli is blind to launch"),
    ],
)
def test_the_import_rule_itself(module: str, target: str, lazy: bool, reason: str | None) -> None:
    assert forbidden(module, target, lazy) == reason


def test_the_reader_of_imports() -> None:
    source = "import a.b\nfrom . import c\nfrom ..d import e\ndef f():\n    from storm import load\n"
    assert list(imports(ast.parse(source), "p.q")) == [
        ("a.b", False, 1),
        ("p.q.c", False, 2),
        ("p.d.e", False, 3),
        ("storm.load", True, 5),
    ]


def test_base_and_data_prep_leave_torch_unloaded() -> None:
    names = [module for module in MODULES if layer_of(module) in {"base", "data_prep"}]
    code = f"import sys, importlib\nfor name in {names}: importlib.import_module(name)\n"
    code += "print(sorted({'torch', 'deepspeed'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_every_folder_of_modules_is_a_package() -> None:
    folders = {path.parent for module, path in MODULES.items() if not module.startswith("launch")}
    assert [str(f.relative_to(REPO)) for f in sorted(folders) if not (f / "__init__.py").is_file()] == []


def tracked() -> list[Path]:
    """The files under version control that exist, relative to the checkout."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=REPO, capture_output=True, text=True, check=True).stdout
    return [Path(name) for name in listed.split("\0") if name and (REPO / name).is_file()]


def test_the_wheel_holds_storm_and_data_prep_alone(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for path in tracked():
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        (source / path).write_bytes((REPO / path).read_bytes())
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(tmp_path)], cwd=source, capture_output=True, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    content = zipfile.ZipFile(wheel)
    names = content.namelist()
    assert wheel.name.startswith("storm_tissue-")
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"storm", "data_prep"}
    for path in tracked():
        if path.parts[0] in {"storm", "data_prep"}:
            assert str(path) in names
    entry_points = next(name for name in names if name.endswith("entry_points.txt"))
    assert "storm = storm.cli:main" in content.read(entry_points).decode()


def test_top_level() -> None:
    assert {p.parts[0] for p in tracked() if not p.parts[0].startswith(".")} - TOP_FOLDERS - TOP_FILES == set()


def sources() -> list[Path]:
    """Every Python file and shell script under version control or in the packages."""
    scripts = [REPO / p for p in tracked() if p.suffix in {".py", ".sh", ".sbatch", ""} and p.name != "LICENSE"]
    return sorted({*scripts, *MODULES.values()})


def test_files_are_short_and_ascii() -> None:
    for path in sources():
        text = path.read_text()
        assert text.isascii(), f"{path}: not ASCII"
        assert text.count("\n") <= MAX_FILE_LINES, f"{path}: {text.count(chr(10))} lines, at most {MAX_FILE_LINES}"


def test_functions_are_short() -> None:
    long = [
        f"{path.relative_to(REPO)}:{node.lineno} {node.name}"
        for path in sources()
        if path.suffix == ".py"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (node.end_lineno or 0) - node.lineno >= MAX_FUNCTION_LINES
    ]
    assert long == []


@pytest.mark.parametrize(
    ("pattern", "rule"),
    [
        (r"pip3? install\s+(-\S+\s+)*['\"]?storm(?!-tissue)", "PyPI's `storm` is another project: storm-tissue"),
        (r"(?:^|[\s\"'`=(:,])/(?:home|root|work)/", "a path of one machine"),
    ],
)
def test_words_that_no_file_holds(pattern: str, rule: str) -> None:
    found = []
    for path in tracked():
        data = (REPO / path).read_bytes()
        if b"\0" not in data:
            lines = enumerate(data.decode().splitlines(), 1)
            found += [f"{path}:{n}: {rule}" for n, line in lines if re.search(pattern, line)]
    assert found == []


def tree_of_readme() -> set[str]:
    """Paths in the README's tree: in the fenced block that begins with storm/, one per line, nested by indentation."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", (REPO / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    (tree,) = [block for block in blocks if block.startswith("storm/")]
    found: set[str] = set()
    above: list[tuple[int, str]] = []
    for line in filter(str.strip, tree.splitlines()):
        indent, name = len(line) - len(line.lstrip()), line.split()[0]
        above = [(i, n) for i, n in above if i < indent] + [(indent, name.rstrip("/"))]
        found.add("/".join(n for _, n in above))
    return found


def test_readme_tree_lists_every_module() -> None:
    listed = tree_of_readme()
    modules = {str(p.relative_to(REPO)) for p in MODULES.values() if p.name != "__init__.py"}
    assert modules - listed == set(), "not in the README's tree"
    assert {path for path in listed if not (REPO / path).exists()} == set(), "in the README's tree, but absent"
