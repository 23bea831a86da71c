"""Configuration of the documentation site. Build it with ``make docs``."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, get_type_hints

import lightning_light as ll

if TYPE_CHECKING:
    from sphinx.application import Sphinx

project = "lightning_light"
copyright = "The lightning_light developers"
release = version = ll.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
exclude_patterns = ["_build", "images", "jupyter_execute"]
default_role = "code"  # single backticks in docstrings are code

html_theme = "furo"
html_title = "lightning_light"

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
nb_execution_mode = "cache"  # a notebook is executed again when its own code has changed, or without `docs/_build`
nb_execution_cache_path = str(Path(__file__).parent / "_build" / ".jupyter_cache")
nb_execution_raise_on_error = True
nb_execution_timeout = 300  # seconds per cell
nb_merge_streams = True

autodoc_inherit_docstrings = False
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_use_ivar = True
copybutton_prompt_is_regexp = True
copybutton_prompt_text = r">>> |\.\.\. |\$ "


def write_reference(app: Sphinx) -> None:
    """Write one page per public module into ``api/``; each name is documented on the page of its innermost module."""
    folder = Path(app.srcdir) / "api"
    folder.mkdir(exist_ok=True)
    modules = {value.__name__: value for value in (ll, *(getattr(ll, name) for name in ll._MODULES))}
    innermost_first = sorted(modules, key=lambda name: (-name.count("."), name))
    page_of: dict[str, str] = {}
    for module in innermost_first:
        for name in modules[module].__all__:
            page_of.setdefault(_canonical(getattr(modules[module], name), name), module)
    for module, value in modules.items():
        objects = {name: getattr(value, name) for name in value.__all__}
        here = {n: o for n, o in objects.items() if page_of[_canonical(o, n)] == module and not inspect.ismodule(o)}
        elsewhere = {n: page_of[_canonical(o, n)] for n, o in objects.items() if n not in here}
        (folder / f"{module}.rst").write_text(_page(module, here, elsewhere, _results(here.values(), page_of)))
    (folder / "index.rst").write_text(_index(sorted(modules)))


def _canonical(value: object, name: str) -> str:
    return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', name)}"


def _results(functions: Iterable[object], page_of: dict[str, str]) -> list[type]:
    """Return the classes that functions return, and that are on no page."""
    hints = [get_type_hints(each).get("return") for each in functions if inspect.isfunction(each)]
    classes = [hint for hint in hints if inspect.isclass(hint) and hint.__module__.startswith("lightning_light.")]
    found = [each for each in dict.fromkeys(classes) if _canonical(each, "") not in page_of]
    page_of.update((_canonical(each, ""), each.__module__) for each in found)
    return found


def _page(module: str, here: dict[str, object], elsewhere: dict[str, str], results: list[type]) -> str:
    parts = [module, "=" * len(module), "", f".. automodule:: {module}", "   :no-members:", ""]
    if elsewhere:
        links = (f":doc:`{name} <{page}>`" for name, page in sorted(elsewhere.items()) if page != module)
        parts += ["Also in this module: " + ", ".join(links) + ".", ""]
    parts += [_directive(f"{module}.{name}", value) for name, value in here.items()]
    return "\n".join([*parts, *(_directive(f"{each.__module__}.{each.__qualname__}", each) for each in results)])


def _directive(path: str, value: object) -> str:
    if inspect.isclass(value):
        kind = "autoexception" if issubclass(value, BaseException) else "autoclass"
        return f".. {kind}:: {path}\n   :members:\n"
    return f".. {'autofunction' if inspect.isfunction(value) else 'autodata'}:: {path}\n"


def _index(modules: list[str]) -> str:
    title = "API reference"
    return (
        f"{title}\n{'=' * len(title)}\n\n.. toctree::\n   :maxdepth: 1\n\n"
        + "\n".join(f"   {m}" for m in modules)
        + "\n"
    )


def show_plain_types(app: Sphinx, described: object, bound_method: bool) -> None:
    """Leave ranges out of the types of arguments; the text beside them has them."""
    with suppress(AttributeError, NameError, TypeError):  # built-in functions; names that are imported for types alone
        described.__annotations__ = get_type_hints(described)


def setup(app: Sphinx) -> None:
    """Generate the reference before the sources are read."""
    app.connect("builder-inited", write_reference)
    app.connect("autodoc-before-process-signature", show_plain_types)
