"""What each ATen operation does to channels: a table of rules, one file a kind of operation.

A tensor carries *marks*: integer tensors of its own rank, of size one in every dimension along which the channel does
not change. An activation ``(N, C, H, W)`` has one mark of shape ``(1, C, 1, 1)``; a weight ``(O, I, k, k)`` has two.
Moving operations (view, slice, cat, ...) are simply carried out on the marks. What no rule knows protects every channel
that reaches it: an unknown operation can cost compression, never correctness.
"""

from lightning_light.dependency.rules import layers, movement, products
from lightning_light.dependency.rules.table import RULES, elementwise, unknown

__all__ = ["RULES", "elementwise", "layers", "movement", "products", "unknown"]
