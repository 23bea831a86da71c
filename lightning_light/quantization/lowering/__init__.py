"""Lowering of a fake-quantized network to a runtime: QDQ graphs, and the int8 kernels of torch."""
