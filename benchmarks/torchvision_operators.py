"""Imported before torchvision, whose wheels for GPUs do not load their operators beside a torch for CPUs.

It cannot be imported then, since it wants two of them to be there. No network of the benchmarks calls one.
"""

import torch

DECLARED = ("nms", "qnms")

for operator in DECLARED:
    torch.library.define(f"torchvision::{operator}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
