"""One run re-parameterizes, prunes, merges and quantizes a network under its dense teacher, and writes the int8 file.

Convolutions train with parallel branches; channels are removed across them; quantization-aware training begins with
the merged network. The Lightning module is that of 01_prune_and_export.py. Two minutes on one CPU core.
"""

import argparse
from importlib import import_module
from pathlib import Path

from rich.console import Console
from rich.table import Table

import lightning_light as ll
from lightning_light.reparameterization import OREPA

train = import_module("06_quantize").train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", help="an .npz file or a folder with the four official files")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--out", type=Path, default=Path("runs/reparameterize"))
    args = parser.parse_args()

    exporters = [ll.TorchScriptLite()]
    dense, before = train("dense", [], exporters, args)
    chain = [
        ll.KnowledgeDistillation(teacher=dense, losses=[ll.SoftTargets(temperature=4.0)]),
        ll.Reparameterization(OREPA()),  # merged when the quantization begins
        ll.StructuredPruning(ll.MACs(0.5), schedule=ll.Window(ll.Cubic(), start=0.1, end=0.5)),
        ll.QuantizationAwareTraining(ll.Int8(), start=0.7, calibration_batches=8),
    ]
    _, after = train("int8", chain, exporters, args)
    table = Table("", "runtime", "accuracy", "of file", "MACs", "size", "latency", title="Before -> after")
    for row in [*before, *after]:
        table.add_row(*row)
    Console().print(table)


if __name__ == "__main__":
    main()
