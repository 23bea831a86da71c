"""The README and the documents say what is true: commands, names and links."""

import ast
import re
from pathlib import Path

import lightning.pytorch
import pytest

import lightning_light as ll
from tests.contract.bodies import Body, module_class

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")])


def blocks(document: Path, language: str) -> list[str]:
    """The fenced code blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", document.read_text(), flags=re.DOTALL | re.MULTILINE)


def test_continuous_integration_runs_the_readmes_test_command() -> None:
    (command,) = [block for block in blocks(ROOT / "README.md", "sh") if "pytest" in block]
    assert command in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)", document.read_text())
    local = [link for link in links if not link.startswith(("http:", "https:", "mailto:"))]
    assert [link for link in local if not (document.parent / link).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_python_in_documents_parses_and_names_what_exists(document: Path) -> None:
    for block in blocks(document, "python"):
        nodes = ast.walk(ast.parse(block))
        names = [node.attr for node in nodes if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "ll"]
        assert [name for name in names if not hasattr(ll, name)] == []


def test_the_example_of_the_readme_runs_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    module, teacher = module_class(Body, lightning.pytorch)(), module_class(Body, lightning.pytorch)()
    names = {"module": module, "teacher": teacher, "data": None}  # the module has its own loaders
    exec(blocks(ROOT / "README.md", "python")[0], names)
    (export,) = [callback for callback in names["trainer"].callbacks if isinstance(callback, ll.MobileExport)]
    assert export.report is not None
    assert export.report.details["int8_layers"] > 0
