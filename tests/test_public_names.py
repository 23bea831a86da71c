"""The public surface: the names of `lightning_light`, its modules, and what the subpackages list."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lightning_light

ROOT = Path(lightning_light.__file__).parent
SUBPACKAGES = sorted(path.parent.name for path in ROOT.glob("*/__init__.py"))
MODULES = sorted(lightning_light._MODULES)


def test_the_surface_is_small_and_shadows_no_name_of_torch_nn() -> None:
    assert len(lightning_light.__all__) <= 70
    assert [name for name in lightning_light.__all__ if hasattr(torch.nn, name)] == []


@pytest.mark.parametrize("name", lightning_light.__all__)
def test_each_public_name_has_a_docstring(name: str) -> None:
    assert (getattr(lightning_light, name).__doc__ or "").strip()
    assert name in dir(lightning_light)


@pytest.mark.parametrize("module", ["", *SUBPACKAGES, *MODULES])
def test_a_module_lists_names_that_exist_in_order(module: str) -> None:
    found = getattr(lightning_light, module) if module in MODULES else None
    found = found or importlib.import_module(f"lightning_light.{module}".rstrip("."))
    names = list(getattr(found, "__all__", []))
    assert names in (sorted(names), sorted(names, key=_as_ruff))
    assert [name for name in names if not hasattr(found, name)] == []


def _as_ruff(name: str) -> tuple[int, str]:
    """Order of isort: constants, classes, functions."""
    return (0 if name.isupper() else 1 if name[0].isupper() else 2), name


def test_type_checkers_see_the_names_that_are_imported_lazily() -> None:
    tree = ast.parse((ROOT / "__init__.py").read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)]
    seen = {alias.asname for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert seen == {*lightning_light.__all__, *MODULES}


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Prunning'"):
        _ = lightning_light.Prunning


@pytest.mark.slow
@pytest.mark.parametrize(("host", "cli_first"), [("lightning.pytorch", True), ("pytorch_lightning", False)])
def test_short_names_are_known_to_lightning_cli_in_any_order_of_imports(host: str, cli_first: bool) -> None:
    imports = [f"import {host}.cli", "import lightning_light"]
    code = "; ".join(imports if cli_first else imports[::-1])
    names = "f = lambda c: {c.__name__}.union(*map(f, c.__subclasses__())); print(*f(L.Callback), sep=',')"
    script = f"{code}; import {host} as L; {names}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.strip().split(","))
    assert {"StructuredPruning", "WeightPruning", "MobileExport", "KnowledgeDistillation"} <= loaded


def test_importing_the_package_imports_nothing_else() -> None:
    script = "import sys, lightning_light; print([m for m in sys.modules if m.split('.')[0] in ('torch', 'lightning')])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
