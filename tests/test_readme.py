"""The README and the documents are right: commands, names, figures and links."""

import ast
import functools
import importlib.util
import inspect
import json
import re
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch
import pytest

import lightning_light as ll
from tests.contract.bodies import Body, module_class

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(ROOT.glob("docs/notebooks/*.ipynb"))
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")])


def blocks(document: Path, language: str) -> list[str]:
    """The fenced code blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", document.read_text(), flags=re.DOTALL | re.MULTILINE)


def test_continuous_integration_runs_the_readmes_test_command() -> None:
    (command,) = [block for block in blocks(ROOT / "README.md", "sh") if "pytest" in block]
    assert command in (ROOT / ".ci" / "run").read_text()


def text_of(document: Path) -> str:
    """The text of a document, or of the cells of a notebook."""
    if document.suffix == ".md":
        return document.read_text()
    return "\n\n".join("".join(cell["source"]) for cell in json.loads(document.read_text())["cells"])


@functools.cache
def anchors(document: Path) -> set[str]:
    """What a link to a document may have behind the ``#``: its headings, as GitHub and the site name them, and ids."""
    text = re.sub(r"^```.*?^```", "", text_of(document), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)", text, flags=re.MULTILINE)
    named = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    return named | set(re.findall(r'<a id="([^"]+)"', text))


@pytest.mark.parametrize("document", [*DOCUMENTS, *NOTEBOOKS], ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)|<a href=\"([^\"]+)", text_of(document))
    for link in [first or second for first, second in links]:
        if not link.startswith(("http:", "https:", "mailto:")):
            path, _, anchor = link.partition("#")
            target = (document.parent / path).resolve() if path else document
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("document", [ROOT / "README.md", ROOT / "docs" / "choosing.md"], ids=lambda path: path.name)
def test_figures_are_those_of_the_experiments(document: Path) -> None:
    measured = (ROOT / "docs" / "experiments.md").read_text()
    lines = [line for line in document.read_text().splitlines() if re.search(r"\d\d\.\d\d (± .*)?%", line)]
    assert lines
    for line in lines:
        rows = [
            re.findall(rf'.*<a id="{re.escape(name)}">.*', measured)[0] for name in re.findall(r"\.md#([^)]+)", line)
        ]
        for figure in re.findall(r"(\d\d\.\d\d(?: ± \d\.\d\d)?) %", line):
            assert f" {figure} " in ("\n".join(rows) or measured), line


def test_every_public_name_and_result_is_in_the_reference(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("conf", ROOT / "docs" / "conf.py")
    assert spec is not None
    assert spec.loader is not None
    conf = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(conf)
    conf.write_reference(SimpleNamespace(srcdir=tmp_path))
    pages = "\n".join(page.read_text() for page in (tmp_path / "api").glob("*.rst"))
    described = [path.rpartition(".")[2] for path in re.findall(r"^\.\. auto[a-z]+:: (.*)", pages, flags=re.MULTILINE)]
    public = {name for module in conf.MODULES for name in module.__all__ if not inspect.ismodule(getattr(module, name))}
    assert sorted({*public, "RunPlan", "MethodPlan", "Plan"} - {*described}) == []
    assert [name for name in ("RunPlan", "StructuredPruning") if described.count(name) != 1] == []


def test_notebooks_are_stored_without_outputs() -> None:
    assert len(NOTEBOOKS) == 2
    for notebook in NOTEBOOKS:
        code = [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]
        assert [(cell["outputs"], cell["execution_count"]) for cell in code] == [([], None)] * len(code)


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
