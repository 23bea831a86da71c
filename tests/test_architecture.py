"""The house rules that a machine can keep: wings stand on a common ground, and only callbacks know Lightning."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).parents[1] / "lightning_light"
FILES = sorted(ROOT.rglob("*.py"))
WINGS = {
    "clustering",
    "distillation",
    "export",
    "kernels",
    "lowrank",
    "monitors",
    "quantization",
    "search",
    "sparsity",
    "structured",
}
HOSTS = {"lightning", "pytorch_lightning", "lightning_fabric"}
HOST_FOLDER = "host"  # the one folder of the core that may import a host
BROUGHT = {
    "PIL",
    "lightning_light",
    "numpy",
    "rich",
    "tensorboard",
    "torch",
    "torchmetrics",
    "typing_extensions",
} | HOSTS
OPTIONAL = {"executorch", "matplotlib", "onnx_ir", "onnxruntime"}  # of an extra: imported where it is used


def imported(tree: ast.Module) -> Iterator[str]:
    """Modules that a file imports as it runs; what it imports for type checkers is free."""
    todo: list[ast.AST] = list(tree.body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            todo += node.orelse
            continue
        yield from imported_by(node)
        todo += ast.iter_child_nodes(node)


def imported_by(node: ast.AST) -> list[str]:
    """Modules that one statement imports."""
    if isinstance(node, ast.ImportFrom):
        return ["." * node.level + (node.module or "")]
    return [alias.name for alias in node.names] if isinstance(node, ast.Import) else []


def room(module: str) -> str:
    """``lightning_light.structured.plan`` -> ``structured``; the package itself -> an empty string."""
    return [*module.split("."), ""][1]


def holds_callback(tree: ast.Module) -> bool:
    """Whether a class of the file has a base that is called ``...Callback``."""
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    return any(ast.unparse(base).endswith("Callback") for node in classes for base in node.bases)


def complaints(file: str, text: str) -> list[str]:
    """What is wrong with ``text`` at ``file``, a path below the package."""
    tree, path = ast.parse(text), PurePosixPath(file)
    names = set(imported(tree))
    mine = path.parts[0] if len(path.parts) > 1 else path.stem
    theirs = {room(name) for name in names if name.split(".")[0] == "lightning_light"}
    found = []
    if {name.split(".")[0] for name in names} & HOSTS and mine != HOST_FOLDER and not holds_callback(tree):
        found.append(f"{file} imports Lightning as it runs, but holds no callback: take what it needs as arguments.")
    packages = {name.split(".")[0] for name in names if not name.startswith(".")} - sys.stdlib_module_names
    if unknown := sorted(packages - BROUGHT - OPTIONAL):
        found.append(f"{file} imports {', '.join(unknown)}, which no dependency of the package brings.")
    at_once = {name.split(".")[0] for node in tree.body for name in imported_by(node)}
    if early := sorted(at_once & OPTIONAL):
        found.append(
            f"{file} imports {', '.join(early)} at once, which only an extra brings: import it where it is used."
        )
    if any(name.startswith(".") for name in names):
        found.append(f"{file} imports relatively: write where the thing lives, from `lightning_light` on.")
    if file == "__init__.py":
        return found
    if "" in theirs:
        found.append(f"{file} imports from `lightning_light` itself: import from where the thing lives.")
    if strangers := sorted((theirs & WINGS) - {mine}):
        who = "is a wing, which stands on the ground" if mine in WINGS else "is the ground, which knows no wing"
        found.append(f"{file} {who}, but it imports {', '.join(strangers)}: move what both need down.")
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_file_keeps_the_rules(file: Path) -> None:
    assert complaints(file.relative_to(ROOT).as_posix(), file.read_text()) == []


def test_every_wing_that_exists_is_known() -> None:
    grounds = {"criteria", "dependency", "host", "measure", "surgery"}
    folders = {file.parent.relative_to(ROOT).parts[0] for file in FILES if file.parent != ROOT}
    assert folders <= WINGS | grounds, "a new folder: is it a wing (name it in WINGS) or ground?"


@pytest.mark.parametrize(
    ("file", "text", "sentence"),
    [
        ("measure/cost.py", "import lightning as L\n", "holds no callback"),
        ("measure/cost.py", "def f():\n    from pytorch_lightning import Trainer\n", "holds no callback"),
        ("sparsity/masks.py", "from lightning_light.structured.plan import plan\n", "is a wing, which stands on"),
        ("sparsity/masks.py", "def f():\n    import lightning_light.export.parity\n", "is a wing, which stands on"),
        ("surgery/edit.py", "from lightning_light.structured import StructuredPruning\n", "knows no wing"),
        ("callback.py", "from lightning_light.export.parity import check\n", "knows no wing"),
        ("surgery/edit.py", "from lightning_light import MACs\n", "import from where the thing lives"),
        ("surgery/edit.py", "from .edit_log import CompressionState\n", "imports relatively"),
        ("surgery/edit.py", "def f():\n    import pandas\n", "which no dependency of the package brings"),
        ("monitors/picture.py", "import matplotlib.pyplot\n", "import it where it is used"),
    ],
)
def test_a_planted_bad_file_is_named_with_its_reason(file: str, text: str, sentence: str) -> None:
    (incompatibility,) = complaints(file, text)
    assert incompatibility.startswith(file)
    assert sentence in incompatibility


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("__init__.py", "from lightning_light.structured import StructuredPruning\n"),
        ("sparsity/masks.py", "from lightning_light.surgery.edit import cut\nfrom lightning_light.sparsity import x\n"),
        ("sparsity/masks.py", "if TYPE_CHECKING:\n    from lightning.pytorch import Trainer\n"),
        ("monitors/monitor.py", "from lightning.pytorch import Callback\nclass Monitor(Callback):\n    pass\n"),
        ("host/classes.py", "import lightning.pytorch\n"),
    ],
)
def test_a_planted_good_file_is_left_alone(file: str, text: str) -> None:
    assert complaints(file, text) == []
