"""Rules of structure and language that a machine can check."""

import ast
import functools
import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import pytest
from torch import nn

REPOSITORY = Path(__file__).parents[1]
ROOT = REPOSITORY / "lightning_light"
FILES = sorted(ROOT.rglob("*.py"))
METHODS = {
    "cli",
    "clustering",
    "depth",
    "distillation",
    "export",
    "lowrank",
    "monitors",
    "nas",
    "quantization",
    "reparameterization",
    "slimmable",
    "sparsity",
    "structured",
    "substitution",
    "tuning",
}
CORE = {"criteria", "dependency", "host", "measure", "report", "surgery"}
COMPOSING = {
    "cli",
    "nas",
    "slimmable",
}  # may import methods, which do not import them
ENTRIES = {"__init__.py", "__main__.py"}  # of the package itself
HOSTS = {"lightning", "pytorch_lightning", "lightning_fabric"}
HOST_FOLDER = "host"  # the one folder of the core that may import a host, and use its private names
DEPENDENCIES = HOSTS | {
    "PIL",
    "lightning_light",
    "numpy",
    "safetensors",
    "scipy",
    "tensorboard",
    "torch",
    "torch_pruning",
    "torchmetrics",
    "tqdm",
    "typing_extensions",
}
OPTIONAL = {
    "executorch",
    "jsonargparse",
    "matplotlib",
    "onnx_ir",
    "onnxruntime",
    "optuna",
    "rich",
    "sqlalchemy",  # of Optuna
    "yaml",
}  # of an extra: imported where used

RETIRED = (
    r"\b(?:the|in|of|our|each) (?:house|wing|ground|room)s?\b(?! truth)",
    r"method cards?|\bthe card\b",
    r"whole numbers?|in_whole_numbers",
    r"\bgrids? of numbers\b|on the grid|grid's",
    r"\banew\b|\blikewise\b|\bat last\b|hangs? together|\boverhear|learns? to live",
    r"\bcouplings?\b|\bledgers?\b|\bjournals?\b|\bblueprints?\b|\bmirrors\b|\bchronicles?\b|\bkeepers?\b|\bregimes?\b",
    r"\btaps?\b",
    r"\banswers\b|\bis told\b|\bare told\b|\bsays so\b|\bminds\b|\bspares?\b",
    r"evidence_batches|observe_batches|keep_float|\bamounts\b",
    r"# fmt: (?:skip|off)",
)
"""Patterns of words that this project does not use; the field has terms for each (see CONTRIBUTING.md)."""


def imported(tree: ast.Module) -> Iterator[str]:
    """Return the modules that a file imports at run time; imports for type checkers do not count."""
    todo: list[ast.AST] = list(tree.body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            todo += node.orelse
            continue
        yield from imported_by(node)
        todo += ast.iter_child_nodes(node)


def imported_by(node: ast.AST) -> list[str]:
    """Return the modules that one statement imports."""
    if isinstance(node, ast.ImportFrom):
        return ["." * node.level + (node.module or "")]
    return [alias.name for alias in node.names] if isinstance(node, ast.Import) else []


def subpackage(module: str) -> str:
    """``lightning_light.structured.plan`` -> ``structured``; the package itself -> an empty string."""
    return [*module.split("."), ""][1]


def holds_callback(tree: ast.Module) -> bool:
    """Whether a class of the file has a base whose name ends in ``Callback``."""
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    return any(ast.unparse(base).endswith("Callback") for node in classes for base in node.bases)


@functools.cache
def private_names_of_lightning() -> frozenset[str]:
    """Return the private functions, classes and attributes that Lightning's sources define, and torch's do not."""
    names: set[str] = set()
    for package in ("lightning.pytorch", "lightning.fabric"):
        spec = importlib.util.find_spec(package)
        assert spec is not None
        assert spec.origin is not None
        for file in Path(spec.origin).parent.rglob("*.py"):
            names |= set(defined(ast.parse(file.read_text())))
    private = {name for name in names if name.startswith("_") and not name.startswith("__")}
    return frozenset(private - set(dir(nn.Module())))


def defined(tree: ast.Module) -> Iterator[str]:
    """Return the names of functions and classes that a file defines, and of attributes that it sets."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id


def private_names_used(tree: ast.Module) -> set[str]:
    """Return Lightning's private names that a file uses, as attributes or in strings, and does not define itself."""
    inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    used |= {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in inside}
    return (used & private_names_of_lightning()) - set(defined(tree))


def violations(file: str, text: str) -> list[str]:
    """Return what is wrong with ``text`` at ``file``, a path below the package."""
    tree, path = ast.parse(text), PurePosixPath(file)
    names = set(imported(tree))
    mine = path.parts[0] if len(path.parts) > 1 else path.stem
    theirs = {subpackage(name) for name in names if name.split(".")[0] == "lightning_light"}
    found = []
    if {name.split(".")[0] for name in names} & HOSTS and mine != HOST_FOLDER and not holds_callback(tree):
        found.append(f"{file} imports Lightning at run time, but holds no callback: take what it needs as arguments.")
    if mine != HOST_FOLDER and (private := sorted(private_names_used(tree))):
        found.append(f"{file} uses {', '.join(private)}, private in Lightning: add a function to `host/` that does.")
    packages = {name.split(".")[0] for name in names if not name.startswith(".")} - sys.stdlib_module_names
    if unknown := sorted(packages - DEPENDENCIES - OPTIONAL):
        found.append(f"{file} imports {', '.join(unknown)}, which is no dependency of the package.")
    at_once = {name.split(".")[0] for node in tree.body for name in imported_by(node)}
    if early := sorted(at_once & OPTIONAL):
        found.append(f"{file} imports {', '.join(early)}, of an extra, at import time: import it where it is used.")
    if any(name.startswith(".") for name in names):
        found.append(f"{file} imports relatively: name the module from `lightning_light` on.")
    if file in ENTRIES:
        return found
    if "" in theirs:
        found.append(f"{file} imports from `lightning_light` itself: import from the module that defines the object.")
    if mine not in COMPOSING and (others := sorted((theirs & METHODS) - {mine})):
        kind = "is a method, which imports itself and the core" if mine in METHODS else "is core and imports no method"
        found.append(f"{file} {kind}, but it imports {', '.join(others)}: move what both need into the core.")
    return found


def retired_words(text: str) -> list[str]:
    """Return the lines of ``text`` that use a retired word, with the word."""
    return [
        f"{number}: {match[0]!r} in {line.strip()[:90]}"
        for number, line in enumerate(text.splitlines(), 1)
        if (match := re.search("|".join(RETIRED), line, flags=re.IGNORECASE))
    ]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_file_keeps_the_rules(file: Path) -> None:
    assert violations(file.relative_to(ROOT).as_posix(), file.read_text()) == []


def test_every_subpackage_is_a_method_or_core() -> None:
    folders = {file.parent.relative_to(ROOT).parts[0] for file in FILES if file.parent != ROOT}
    assert folders <= METHODS | CORE, "a new folder: add it to METHODS or CORE"


def imports_within_the_package() -> dict[str, set[str]]:
    """Module -> modules of the package that it imports, also inside functions and for type checkers."""
    modules = {".".join(("lightning_light", *file.relative_to(ROOT).with_suffix("").parts)): file for file in FILES}
    modules = {name.removesuffix(".__init__"): file for name, file in modules.items()}
    graph: dict[str, set[str]] = {}
    for name, file in modules.items():
        found = (module for node in ast.walk(ast.parse(file.read_text())) for module in imported_by(node))
        graph[name] = {module for module in found if module in modules} - {name}
    return graph


def test_there_are_no_import_circles() -> None:
    graph = imports_within_the_package()
    while leaves := [name for name, needs in graph.items() if not needs & set(graph)]:
        graph = {name: needs for name, needs in graph.items() if name not in leaves}
    assert {name: sorted(needs & set(graph)) for name, needs in graph.items()} == {}


TEXTS = [
    *FILES,
    *(REPOSITORY / "tests").rglob("*.py"),
    *(REPOSITORY / "examples").rglob("*.py"),
    *(REPOSITORY / "benchmarks").rglob("*.py"),
    *REPOSITORY.glob("*.md"),
    *(REPOSITORY / "docs").rglob("*.md"),
]


@pytest.mark.parametrize(
    "file",
    [file for file in sorted(TEXTS) if file != Path(__file__)],
    ids=lambda file: str(file.relative_to(REPOSITORY)),
)
def test_no_retired_word(file: Path) -> None:
    assert retired_words(file.read_text()) == []


@pytest.mark.parametrize("text", ["told by the ledger", "x = evidence_batches", "y = 1  # fmt: skip", "computed anew"])
def test_a_retired_word_is_found(text: str) -> None:
    assert len(retired_words(f"fine\n{text}\n")) == 1


@pytest.mark.parametrize(
    ("file", "text", "sentence"),
    [
        ("measure/cost.py", "import lightning as L\n", "holds no callback"),
        ("measure/cost.py", "def f():\n    from pytorch_lightning import Trainer\n", "holds no callback"),
        (
            "sparsity/masks.py",
            "from lightning_light.structured.plan import plan\n",
            "is a method, which imports",
        ),
        ("sparsity/masks.py", "def f():\n    import lightning_light.export.parity\n", "is a method, which imports"),
        ("surgery/edit.py", "from lightning_light.structured import StructuredPruning\n", "imports no method"),
        ("export/files.py", "from lightning_light.cli.command import main\n", "is a method, which imports"),
        ("callback.py", "from lightning_light.export.parity import check\n", "imports no method"),
        ("surgery/edit.py", "from lightning_light import MACs\n", "import from the module that defines"),
        ("surgery/edit.py", "from .state import CompressionState\n", "imports relatively"),
        ("surgery/edit.py", "def f():\n    import pandas\n", "is no dependency of the package"),
        ("monitors/picture.py", "import matplotlib.pyplot\n", "import it where it is used"),
        ("progress.py", "def f(t):\n    return t.fit_loop._should_accumulate()\n", "private in Lightning"),
        ("sparsity/masks.py", "def f(m):\n    return getattr(m, '_trainer', None)\n", "private in Lightning"),
    ],
)
def test_a_planted_bad_file_is_reported_with_its_reason(file: str, text: str, sentence: str) -> None:
    (violation,) = violations(file, text)
    assert violation.startswith(file)
    assert sentence in violation


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("__init__.py", "from lightning_light.structured import StructuredPruning\n"),
        ("sparsity/masks.py", "from lightning_light.surgery.edit import cut\nfrom lightning_light.sparsity import x\n"),
        ("cli/files.py", "from lightning_light.export import load_exported\n"),
        ("sparsity/masks.py", "if TYPE_CHECKING:\n    from lightning.pytorch import Trainer\n"),
        ("monitors/monitor.py", "from lightning.pytorch import Callback\nclass Monitor(Callback):\n    pass\n"),
        ("host/classes.py", "import lightning.pytorch\n"),
        ("host/trainer.py", "def f(t):\n    return t.fit_loop._should_accumulate()\n"),
        ("surgery/edit.py", "def f(m):\n    return m._parameters\n"),
    ],
)
def test_a_planted_good_file_is_accepted(file: str, text: str) -> None:
    assert violations(file, text) == []
