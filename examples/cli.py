"""The examples' network on ``LightningLightCLI``: methods, budgets, schedules and criteria are written in YAML.

``python examples/cli.py fit --config examples/configs/prune.yaml`` ends with the weights of 01_prune_and_export.py,
and ``quantize.yaml`` with those of 06_quantize.py, a chain of methods.
"""

from importlib import import_module

from fashion_mnist import FashionMNIST

from lightning_light.cli import LightningLightCLI

if __name__ == "__main__":
    LightningLightCLI(import_module("01_prune_and_export").Classifier, FashionMNIST, seed_everything_default=0)
