"""Every `.ptl` file, float and int8, in the last lite runtime that was published for Android: torch 2.1.

    python benchmarks/lite_2_1.py --python /path/to/old/python     # pip install torch==2.1.2 "numpy<2"

Writes a file for each network of ``tests/zoo.py`` in float and for both int8 engines, with this torch; then the other
Python runs them on the same inputs and prints the differences of the outputs. It does not need this package.
"""

import argparse
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import torch

FORMS = ("float", "qnnpack", "x86")


def leaves(value):
    """Return the tensors of an output, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = [value[key] for key in sorted(value)]
    return [leaf for item in value for leaf in leaves(item)] if isinstance(value, (list, tuple)) else []


def write(folder: Path) -> None:
    import lightning_light as ll
    from lightning_light.example_input import ExampleInput
    from tests.zoo import ZOO

    for name in sorted(ZOO):
        for form in FORMS:
            torch.manual_seed(0)
            net = ZOO[name]().eval()
            args, kwargs = net.example
            path = folder / f"{name}.{form}.ptl"
            if form == "float":
                report = ll.export_model(net, ExampleInput(args, kwargs), path, latency_runs=1)
            else:
                ll.quantize(net, args or kwargs, ll.Int8(engine=form))
                with ll.fake_quantized(net):
                    report = ll.export_model(net, ExampleInput(args, kwargs), path, latency_runs=1)
            inputs = [value for value in (*args, *kwargs.values()) if not isinstance(value, (bool, int, float))]
            outputs = leaves(ll.TorchScriptLite().load(path)(*inputs))
            scales = report.details.get("output_scales", [0.0] * len(outputs))
            torch.save({"inputs": inputs, "outputs": outputs, "scales": scales}, path.with_suffix(".pt"))


def read(folder: Path) -> None:
    from torch.jit.mobile import _load_for_lite_interpreter

    print(f"torch {torch.__version__}")
    for form in FORMS:
        paths, failed, worst, steps, equal = sorted(folder.glob(f"*.{form}.ptl")), [], 0.0, 0.0, 0
        torch.backends.quantized.engine = "qnnpack" if form == "float" else form
        for path in paths:
            known = torch.load(path.with_suffix(".pt"))
            try:
                found = leaves(_load_for_lite_interpreter(str(path))(*known["inputs"]))
            except RuntimeError as error:
                failed.append(f"{path.name}: {str(error).strip().splitlines()[0][:120]}")
                continue
            for right, asked, scale in zip(known["outputs"], found, known["scales"]):  # noqa: B905  Python 3.9
                off = float((right.double() - asked.double()).abs().max())
                worst, equal = max(worst, off), equal + (off == 0.0)
                steps = max(steps, off / scale) if scale else steps
        print(
            f"{form}: {len(paths) - len(failed)} of {len(paths)} run, {equal} outputs equal bit for bit, off by",
            f"{worst:.1e}, {steps:.2f} quantization steps of an output",
        )
        print(*failed, sep="\n", end="\n" if failed else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", help="with torch 2.1")
    parser.add_argument("--read", type=Path, help="used in the call of the other Python")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    if args.read:
        read(args.read)
        return
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        read(Path(folder))
        sys.stdout.flush()
        subprocess.run([args.python, __file__, "--read", folder], check=True)


if __name__ == "__main__":
    main()
