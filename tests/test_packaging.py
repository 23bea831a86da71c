"""The package needs no more than its hard dependencies."""

import re
import subprocess
import sys
from pathlib import Path

OPTIONAL = ["executorch", "jsonargparse", "onnx", "onnx_ir", "onnxruntime", "onnxscript", "rich"]
"""Not matplotlib: torchmetrics imports it wherever its metadata is found."""


def test_every_public_name_is_imported_with_hard_dependencies_only() -> None:
    """What cannot be imported is marked as Python itself marks it."""
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({OPTIONAL}))\n"
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
