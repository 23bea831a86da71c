"""Export: a file for the device, run and compared before anyone relies on it."""

from lightning_light.export.executorch import ExecuTorch
from lightning_light.export.exporter import Exporter
from lightning_light.export.functional import ExportOptions, export_model
from lightning_light.export.loading import load_exported
from lightning_light.export.mobile_export import MobileExport
from lightning_light.export.onnx import ONNX
from lightning_light.export.parity import Parity, Tolerance
from lightning_light.export.report import ExportReport
from lightning_light.export.torch_export import TorchExport
from lightning_light.export.torchscript_lite import TorchScriptLite

__all__ = [  # plain order, capitals or not
    "ExecuTorch",
    "ExportOptions",
    "ExportReport",
    "Exporter",
    "MobileExport",
    "ONNX",
    "Parity",
    "Tolerance",
    "TorchExport",
    "TorchScriptLite",
    "export_model",
    "load_exported",
]
