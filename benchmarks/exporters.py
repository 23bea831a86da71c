"""One residual network of the tests, exported in every format: size, parity, latency.

python benchmarks/exporters.py
"""

import tempfile

import torch

from lightning_light.export import ONNX, ExecuTorch, Exporter, TorchExport, TorchScriptLite, export_model
from tests.zoo import Residual, noise


def main() -> None:
    """Print a row of the table for each runtime."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = Residual()
    exporters: list[Exporter] = [TorchScriptLite(), ONNX(), ExecuTorch(), ExecuTorch(partitioner=None), TorchExport()]
    print("| exporter | runtime | bytes | largest difference | ms per sample |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for exporter in exporters:
            path = f"{folder}/net{exporter.suffix}"
            report = export_model(net, (noise(8, 3, 32, 32),), path, exporter=exporter, latency_runs=200)
            print(
                f"| `{exporter}` | {report.runtime} | {report.bytes} | {report.parity.max_absolute:.1e} | "
                f"{report.latency.median * 1e3:.3f} |"
            )


if __name__ == "__main__":
    main()
