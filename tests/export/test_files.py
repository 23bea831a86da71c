"""Files as files: self-contained, and whole whatever happens while they are written."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_light.errors import LightningLightError, UnsupportedError
from lightning_light.export import ExportReport, MobileExport, export_model, load_exported
from lightning_light.quantization import Int8, QuantizationAwareTraining, fake_quantized, quantize
from tests.export.nets import Images, Lit, Records, fit
from tests.zoo import ZOO, noise

QUICK: dict[str, Any] = {"latency_runs": 1}
LOAD = """
import sys, torch
sys.modules["lightning_light"] = sys.modules["lightning"] = sys.modules["tests"] = None
inputs, expected = torch.load(sys.argv[2])
for found, right in zip(torch.export.load(sys.argv[1]).module()(*inputs), expected, strict=True):
    torch.testing.assert_close(found, right)
print("equal")
"""


def test_a_pt2_file_is_loaded_without_this_package_and_without_the_code_of_the_network(tmp_path: Path) -> None:
    net, path = Records().eval(), tmp_path / "m.pt2"
    record = {"numbers": noise(2, 4), "image": noise(2, 3, 8, 8)}
    report = export_model(net, (record,), path, **QUICK)
    assert (report.exporter, report.details["outputs"]) == ("TorchExport()", ["features", "logits"])
    larger = {"numbers": noise(7, 4), "image": noise(7, 3, 8, 8)}
    with torch.no_grad():
        expected = net(larger)
    inputs = [larger["image"], larger["numbers"]]  # by the order of keys
    for found, name in zip(load_exported(path)(*inputs), sorted(expected), strict=True):
        torch.testing.assert_close(found, expected[name])
    torch.save((inputs, [expected["features"], expected["logits"]]), tmp_path / "call.pt")
    script = [sys.executable, "-c", LOAD, str(path), str(tmp_path / "call.pt")]
    assert subprocess.run(script, capture_output=True, text=True, check=True).stdout == "equal\n"
    content = path.read_bytes()
    assert b"nets.py" not in content
    assert record["image"][0].numpy().tobytes()[:64] not in content


def test_a_pt2_file_is_float(tmp_path: Path) -> None:
    module = Lit(Images())
    with pytest.raises(UnsupportedError, match=r"exporter=TorchExport\(\)\)`: expected a float network"):
        fit(module, QuantizationAwareTraining(Int8(), start=0.5), MobileExport(tmp_path / "m.pt2"))
    net = quantize(ZOO["plain"]().eval(), noise(2, 3, 8, 8), Int8(), data=[noise(4, 3, 8, 8)])
    with fake_quantized(net), pytest.raises(UnsupportedError, match="found a fake-quantized `Plain`"):
        export_model(net, noise(1, 3, 8, 8), tmp_path / "m.pt2", **QUICK)
    assert not (tmp_path / "m.pt2").exists()


FULL_DISK = """
import resource, sys, warnings
warnings.simplefilter("ignore")
from lightning_light.export import export_model
from tests.zoo import ZOO, noise
net, images = ZOO["plain"](), noise(2, 3, 8, 8)
for path in sys.argv[1:]:
    export_model(net, images, path, latency_runs=1)
for limit in (3000, 10):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    for path in sys.argv[1:]:
        try:
            export_model(net, images, path, latency_runs=1)
        except OSError as error:
            print(error)
"""


@pytest.mark.slow
def test_a_full_disk_leaves_the_files_before_whole(tmp_path: Path) -> None:
    paths = [tmp_path / f"m.{suffix}" for suffix in ("ptl", "pt2", "onnx", "pte")]
    script = [sys.executable, "-c", FULL_DISK, *map(str, paths)]
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    assert done.stdout.count("File too large") == 2 * len(paths), done.stderr
    assert sorted(os.listdir(tmp_path)) == sorted(
        [*(one.name for one in paths), *(f"{one.name}.json" for one in paths)]
    )
    for path in paths:
        assert ExportReport.read(f"{path}.json").bytes == path.stat().st_size
        assert load_exported(path)(noise(3, 3, 8, 8)).shape == (3, 5)


def test_two_runs_that_export_to_one_path_at_once(tmp_path: Path) -> None:
    (first, second), path = (ZOO["plain"]().eval(), ZOO["residual"]().eval()), tmp_path / "m.ptl"
    images, labels = noise(2, 3, 8, 8), torch.tensor([0, 1])

    def batches() -> Iterator[Any]:
        """The other run exports when the file of this one is written, and not yet renamed."""
        yield from [(images, labels)] * 4
        assert len(os.listdir(tmp_path)) == 1
        export_model(second, images, path, **QUICK)
        yield images, labels

    export_model(first, images, path, data=batches(), **QUICK)
    assert sorted(os.listdir(tmp_path)) == ["m.ptl", "m.ptl.json"]
    with torch.no_grad():
        torch.testing.assert_close(load_exported(path)(images), first(images))
    assert ExportReport.read(f"{path}.json").bytes == path.stat().st_size


def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    """The error is the export's; the network that could not be saved stays in the module."""
    folder = tmp_path / "file"
    folder.write_text("no folder")
    module = Lit(Images())
    with pytest.raises(LightningLightError, match=r"failed after training: .*could not be saved in .*m.ptl.ckpt"):
        fit(module, MobileExport(folder / "m.ptl", **QUICK))
    assert folder.read_text() == "no folder"


def test_a_float_file_of_a_quantized_network_is_named(tmp_path: Path) -> None:
    images = noise(2, 3, 8, 8)
    net = quantize(ZOO["plain"]().eval(), images, Int8("qnnpack"), data=[images])
    with pytest.warns(UserWarning, match="float file of a quantized network.*with fake_quantized"):
        float_file = export_model(net, images, tmp_path / "float.ptl", **QUICK)
    with fake_quantized(net):
        int8_file = export_model(net, images, tmp_path / "int8.ptl", **QUICK)
    assert "int8_layers" not in float_file.details
    assert int8_file.details["int8_layers"] > 0


def test_an_onnx_file_is_one_message_of_protobuf_with_all_weights(tmp_path: Path) -> None:
    onnx, numpy_helper = pytest.importorskip("onnx"), pytest.importorskip("onnx.numpy_helper")
    pytest.importorskip("onnxruntime")
    net, path = nn.Sequential(nn.Linear(8, 300), nn.ReLU(), nn.Linear(300, 4)).eval(), tmp_path / "net.onnx"
    export_model(net, torch.randn(2, 8), path, latency_runs=1)
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert model.ByteSize() == path.stat().st_size
    arrays = map(numpy_helper.to_array, model.graph.initializer)
    weights = {array.shape: torch.from_numpy(array.copy()) for array in arrays}
    assert all(torch.equal(weights[tuple(own.shape)], own) for own in net.parameters())
