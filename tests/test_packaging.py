"""The package needs no more than its hard dependencies."""

import re
import subprocess
import sys
from pathlib import Path

OPTIONAL = ("executorch", "jsonargparse", "matplotlib", "onnx", "onnx_ir", "onnxruntime", "onnxscript", "rich")
BLOCK = f"""
import builtins, sys
original = builtins.__import__
def imported(name, globals=None, *args, **kwargs):
    if name.partition('.')[0] in {OPTIONAL!r} and (globals or {{}}).get('__name__', '').startswith('lightning_light'):
        raise ImportError(f'No module named {{name!r}}')
    return original(name, globals, *args, **kwargs)
builtins.__import__ = imported
"""


def test_every_public_name_is_imported_with_hard_dependencies_only() -> None:
    """Imports by this package alone are blocked: Lightning imports what is installed."""
    code = (
        f"{BLOCK}\n"
        "import lightning_light as ll\n"
        "print(len([getattr(ll, name) for name in [*ll.__all__, *ll._MODULES]]))\n"
        "from lightning_light.cli.command import main\n"
        "sys.exit(main(['inspect', 'last.ckpt']))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert int(done.stdout) > 60
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("lightning-light:")]
    assert line.endswith("Install them: `pip install lightning-light[cli]`.")


def test_all_optional_packages_are_in_an_extra_and_not_required() -> None:
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    required, _, extras = text.partition("[project.optional-dependencies]")
    for name in ("executorch", "jsonargparse", "matplotlib", "onnx", "onnxruntime", "onnxscript", "rich"):
        assert re.search(rf'"{name}[\[>=]', extras)
        assert not re.search(rf'^    "{name}\b', required, flags=re.MULTILINE)
    assert (Path(__file__).parents[1] / "lightning_light" / "py.typed").exists()
