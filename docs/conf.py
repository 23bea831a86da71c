"""Configuration of the documentation site. Build it with ``make docs``."""

from __future__ import annotations

import ast
import importlib
import inspect
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_type_hints

from lightning.pytorch import Callback

import lightning_light as ll

if TYPE_CHECKING:
    from docutils.nodes import Element
    from sphinx.addnodes import pending_xref
    from sphinx.application import Sphinx
    from sphinx.environment import BuildEnvironment

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
default_role = "py:obj"  # single backticks in docstrings are names, and links

# Every reference to a name of this package leads somewhere; other packages are named without a link, since their
# inventories would have to be fetched.
nitpicky = True
nitpick_ignore_regex = [
    (r"py:.*", r"(torch|lightning|pytorch_lightning|torchmetrics|torch_pruning|optuna|matplotlib|numpy|PIL)(\..*)?"),
    (r"py:.*", r"(Literal|collections|os|pathlib|types|typing|typing_extensions)(\..*)?"),
]

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
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_use_ivar = True
copybutton_prompt_is_regexp = True
copybutton_prompt_text = r">>> |\.\.\. |\$ "


FOR_EXTENSIONS = ("cli", "dependency", "order", "progress", "runtime", "timing", "validation")
MODULES = [ll, *(getattr(ll, name) for name in ll._MODULES)]
MODULES += [importlib.import_module(f"lightning_light.{name}") for name in FOR_EXTENSIONS]


def write_reference(app: Sphinx) -> None:
    """Write one page per public module into ``api/``; each name is documented on the page of its innermost module.

    Classes in the signatures of a page that are public nowhere else are described on it too.
    """
    folder = Path(app.srcdir) / "api"
    folder.mkdir(exist_ok=True)
    for name, module in list(sys.modules.items()):
        if name.startswith("lightning_light."):
            _import_for_types(module)
    modules = {value.__name__: value for value in MODULES}
    innermost_first = sorted(modules, key=lambda name: (-name.count("."), name))
    page_of: dict[str, str] = {}
    for module in innermost_first:
        for name in modules[module].__all__:
            page_of.setdefault(_canonical(getattr(modules[module], name), name), module)
    for module, value in modules.items():
        objects = {name: getattr(value, name) for name in value.__all__}
        here = {n: o for n, o in objects.items() if page_of[_canonical(o, n)] == module and not inspect.ismodule(o)}
        elsewhere = {n: page_of[_canonical(o, n)] for n, o in objects.items() if n not in here}
        (folder / f"{module}.rst").write_text(_page(module, here, elsewhere, _mentioned(here.values(), page_of)))
    (folder / "index.rst").write_text(_index(sorted(modules)))


def _import_for_types(module: ModuleType) -> None:
    """Import what a module imports for type checkers alone, so that its annotations can be resolved."""
    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            with suppress(ImportError):  # of an extra that is not installed
                exec(compile(ast.Module(node.body, []), str(module.__file__), "exec"), vars(module))


def _canonical(value: Any, name: str) -> str:
    """Name the place where a class or function is defined; a type alias has the names of its type."""
    plain = inspect.isclass(value) or inspect.isfunction(value)
    return f"{value.__module__}.{value.__qualname__}" if plain else f"{name} {id(value)}"


def _mentioned(objects: Iterable[object], page_of: dict[str, str]) -> list[type]:
    """Return the classes in the signatures of ``objects`` that are on no page, those in their own signatures too."""
    found: list[type] = []
    todo = list(objects)
    for each in todo:
        hints = [hint for _, types in _plain_types(each) for hint in types.values()]
        for kind in (kind for hint in hints for kind in _classes(hint)):
            if _canonical(kind, "") not in page_of and not kind.__name__.startswith("_"):
                page_of[_canonical(kind, "")] = kind.__module__
                found.append(kind)
                todo.append(kind)
    return found


def _plain_types(described: Any) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Yield what of a class or function has annotations, with the types: without ranges, bounds of type variables."""
    for annotated, source in _annotated(described):
        hints = get_type_hints(source)
        own = vars(annotated).get("__annotations__", {}) if inspect.isclass(annotated) else annotated.__annotations__
        yield annotated, {n: _bound(hints.get(n, type(None))) for n in own if not n.startswith("_")}


def _bound(hint: Any) -> Any:
    """Replace the type variables in a type by their bounds."""
    if isinstance(hint, TypeVar):
        return hint.__bound__ or Any
    variables = getattr(hint, "__parameters__", ()) if get_args(hint) else ()
    return hint[tuple(map(_bound, variables))] if variables else hint


def _annotated(described: Any) -> Iterator[tuple[Any, Any]]:
    """Yield a function, or a class and its described methods, each with what its annotations are resolved for."""
    if inspect.isfunction(described):
        yield (inspect.unwrap(described),) * 2
    if inspect.isclass(described) and described.__module__.startswith("lightning_light."):
        yield described, described
        for name, member in vars(described).items():
            function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
            if inspect.isfunction(function) and (name == "__init__" or not _is_hidden(name)):
                generated = name == "__init__" and "__dataclass_params__" in vars(described)
                yield inspect.unwrap(function), described if generated else inspect.unwrap(function)


def _classes(hint: object) -> Iterator[type]:
    """Yield the classes of this package in a type."""
    if inspect.isclass(hint) and hint.__module__.startswith("lightning_light."):
        yield hint
    for each in get_args(hint):
        yield from _classes(each)


def _page(module: str, here: dict[str, object], elsewhere: dict[str, str], results: list[type]) -> str:
    parts = [module, "=" * len(module), "", f".. automodule:: {module}", "   :no-members:", ""]
    if elsewhere:
        links = (f":py:obj:`{name} <{page}.{name}>`" for name, page in sorted(elsewhere.items()) if page != module)
        parts += ["Also in this module: " + ", ".join(links) + ".", ""]
    parts += [_directive(f"{module}.{name}", value) for name, value in here.items()]
    return "\n".join([*parts, *(_directive(f"{each.__module__}.{each.__qualname__}", each) for each in results)])


def _directive(path: str, value: object) -> str:
    if inspect.isclass(value):
        kind = "autoexception" if issubclass(value, BaseException) else "autoclass"
        return f".. {kind}:: {path}\n   :members:\n   :special-members: __call__\n"
    return f".. {'autofunction' if inspect.isfunction(value) else 'autodata'}:: {path}\n"


def _index(modules: list[str]) -> str:
    title = "API reference"
    return (
        f"{title}\n{'=' * len(title)}\n\n.. toctree::\n   :maxdepth: 1\n\n"
        + "\n".join(f"   {m}" for m in modules)
        + "\n"
    )


def show_plain_types(app: Sphinx) -> None:
    """Leave ranges out of the types of arguments; the text beside them has them."""
    page_of: dict[str, str] = {}
    public = [getattr(module, name) for module in MODULES for name in module.__all__]
    for described in [*public, *_mentioned(public, page_of)]:
        for annotated, types in _plain_types(described):
            annotated.__annotations__.update(types)  # the same dict as of what wraps a function


def link_short_name(app: Sphinx, env: BuildEnvironment, node: pending_xref, text: Element) -> Element | None:
    """Link a name in single backticks, given without its module."""
    target = node["reftarget"]
    if node.get("reftype") != "obj" or (target.startswith("lightning_light.") and target.count(".") > 1):
        return None
    target = target.removeprefix("lightning_light.")
    found = env.domains["py"].find_obj(env, node.get("py:module"), node.get("py:class"), target, "obj", 1)
    if not found:
        return None
    from sphinx.util.nodes import make_refnode

    name, entry = min(found, key=lambda each: len(each[0]))
    return make_refnode(app.builder, node["refdoc"], entry.docname, entry.node_id, text, name)


def hide_member(app: Sphinx, what: str, name: str, member: object, skip: bool, options: object) -> bool | None:
    """Leave out of the reference what Lightning calls, what only checkpoints use, and what a method overrides."""
    function = member.fget if isinstance(member, property) else member
    owner = getattr(function, "__qualname__", "").partition(".")[0]
    kind = getattr(sys.modules.get(getattr(function, "__module__", "")), owner, None)
    is_method = (
        inspect.isclass(kind) and issubclass(kind, ll.CompressionCallback) and kind is not ll.CompressionCallback
    )
    return True if _is_hidden(name) or (is_method and name in dir(ll.CompressionCallback)) else None


def _is_hidden(name: str) -> bool:
    private = name.startswith("_") and name != "__call__"  # what a subclass of a criterion or schedule defines
    return private or name in dir(Callback) or name == "state_schema"


def setup(app: Sphinx) -> None:
    """Generate the reference before the sources are read."""
    app.connect("builder-inited", write_reference)
    app.connect("builder-inited", show_plain_types)
    app.connect("autodoc-skip-member", hide_member)
    app.connect("missing-reference", link_short_name)
