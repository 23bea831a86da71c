"""The sdist and the wheel are complete, and the wheel needs no more than its hard dependencies."""

import re
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
OPTIONAL = {"executorch", "jsonargparse", "matplotlib", "onnx", "onnxruntime", "onnxscript", "optuna", "rich"}
TRAINING = """
import lightning_light as ll
import lightning as L
import torch
from torch import nn

class Net(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return self(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

assert "site-packages" not in ll.__file__
[getattr(ll, name) for name in [*ll.__all__, *ll._MODULES]]
pruning = ll.StructuredPruning(ll.MACs(0.5), schedule=ll.OneShot(at=0.5))
callbacks = [pruning, ll.CompressionMonitor(), ll.MobileExport("net.ptl")]
trainer = L.Trainer(max_epochs=2, accelerator="cpu", callbacks=callbacks)
module = Net()
trainer.fit(module, torch.utils.data.DataLoader(torch.ones(8, 8), batch_size=4))
trainer.save_checkpoint("net.ckpt")
assert module.net[0].out_features == 8
"""
COMMAND = """
import sys
from importlib.metadata import entry_points
(point,) = entry_points(group="console_scripts", name="lightning-light")
main = point.load()
print("status", main(["inspect", "net.ckpt"]))
main(["--help"])
"""


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist, and the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("archives")

    def build(target: str, source: Path) -> Path:
        command = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(folder)]
        subprocess.run(command, cwd=source, check=True, capture_output=True)
        (found,) = folder.glob("*.whl" if target == "wheel" else "*.tar.gz")
        return found

    sdist = build("sdist", ROOT)
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    return sdist, build("wheel", folder / sdist.name.removesuffix(".tar.gz"))


def requirements(name: str, extra: str) -> set[str]:
    """The names of all distributions that one requires, with an extra; those of their own extras included."""
    found: set[str] = set()
    left = [(name, extra)]
    while left:
        name, extra = left.pop()
        for requirement in map(Requirement, distribution(name).requires or ()):
            needed = requirement.marker is None or requirement.marker.evaluate({"extra": extra})
            if needed and requirement.name not in found:
                found.add(requirement.name)
                left += [(requirement.name, each) for each in ("", *requirement.extras)]
    return found


def run(folder: Path, code: str, extra: str = "") -> subprocess.CompletedProcess[str]:
    """Run code where only the wheel and what it requires can be imported."""
    for name in requirements("lightning-light", extra):
        found = distribution(name)
        for top in {file.parts[0] for file in found.files or ()} - {"..", "__pycache__"}:
            if not (folder / top).exists():
                (folder / top).symlink_to(found.locate_file(top))
    start = f"import sys; sys.path.append({str(folder)!r})\n"
    command = [sys.executable, "-I", "-S", "-W", "ignore", "-c", start + code]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_the_archives_are_complete(archives: tuple[Path, Path]) -> None:
    sdist, wheel = archives
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "README.md", "pyproject.toml", "tests/zoo.py", "examples/configs/prune.yaml"} <= names
    assert not [name for name in names if re.search(r"\.(ckpt|ptl|pte|onnx|pyc)$|(^|/)\.venv|lightning_logs", name)]
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = Parser().parsestr(archive.read(next(n for n in names if n.endswith("/METADATA"))).decode())
        points = archive.read(next(n for n in names if n.endswith("/entry_points.txt"))).decode()
    package = {str(path.relative_to(ROOT)) for path in (ROOT / "lightning_light").rglob("*.py")}
    assert {name for name in names if ".dist-info/" not in name} == package | {"lightning_light/py.typed"}
    assert [name for name in names if name.endswith(".dist-info/licenses/LICENSE")]
    assert points == "[console_scripts]\nlightning-light = lightning_light.cli.command:main\n"
    required = {Requirement(text) for text in metadata.get_all("Requires-Dist", [])}
    assert {each.name for each in required if each.marker} >= OPTIONAL
    assert not OPTIONAL & {each.name for each in required if not each.marker}
    assert {"cli", "docs", "executorch", "onnx", "report", "search"} <= set(metadata.get_all("Provides-Extra", []))
    assert metadata["Requires-Python"] == ">=3.10"


@pytest.mark.slow
def test_the_wheel_runs_with_its_hard_dependencies_alone(archives: tuple[Path, Path], tmp_path: Path) -> None:
    with zipfile.ZipFile(archives[1]) as archive:
        archive.extractall(tmp_path)
    trained = run(tmp_path, TRAINING)
    assert trained.returncode == 0, trained.stderr[-3000:]
    assert (tmp_path / "net.ptl").exists()
    refused = run(tmp_path, "import runpy; runpy.run_module('lightning_light', run_name='__main__')")
    assert refused.returncode == 1
    assert refused.stderr.endswith("Install them: `pip install lightning-light[cli]`.\n")
    command = run(tmp_path, COMMAND, extra="cli")
    assert command.returncode == 0, command.stderr[-3000:]
    assert re.search(r"net\.0 +16 → 8 ", command.stdout)
    assert "status 0\nusage: lightning-light" in command.stdout
