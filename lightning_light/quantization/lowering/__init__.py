"""How a runtime is told to round: on kernels of torch, or as operations in a graph."""
