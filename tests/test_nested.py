"""Tensors in any container that a forward pass takes or returns."""

from collections import OrderedDict, UserDict, namedtuple
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence

from lightning_light.nested import map_tensors, named_leaves, tensors_in

Pair = namedtuple("Pair", ["left", "right"])


class Dict(OrderedDict):
    """A dict that `torch.utils._pytree` does not know, as of Hugging Face."""


@dataclass
class Output:
    """An output as users write it."""

    logits: Any = field(default_factory=lambda: torch.tensor(1))
    hidden: Any = None


class Plain:
    """An object with tensors in its attributes."""

    def __init__(self) -> None:
        self.logits = [torch.tensor(1)]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (torch.tensor(1), [1]),
        ((torch.tensor(1), [torch.tensor(2), {"a": torch.tensor(3)}]), [1, 2, 3]),
        (Pair(torch.tensor(1), {"b": torch.tensor(2)}), [1, 2]),
        (Dict(b=torch.tensor(2), a=torch.tensor(1)), [2, 1]),
        (UserDict(x=[torch.tensor(4)]), [4]),
        ([Output(hidden=(torch.tensor(2),))], [1, 2]),
        (torch.max(torch.tensor([[1, 5]]), dim=1), [5, 1]),
        (pack_sequence([torch.tensor([7])]), [7, 1]),
        (Plain(), []),
        (Output, []),
        ("text", []),
        (None, []),
    ],
)
def test_tensors_are_found_in_order(value: Any, expected: list[int]) -> None:
    assert [int(tensor) for tensor in tensors_in(value)] == expected


def test_attributes_of_other_objects_on_request() -> None:
    assert [int(tensor) for tensor in tensors_in([Plain()], objects=True)] == [1]


def test_containers_keep_their_kind() -> None:
    value = (Pair(torch.tensor(1), "text"), Dict(a=[torch.tensor(2)]), "text", Plain(), [Output()])
    changed = map_tensors(lambda tensor: tensor + 1, value)
    assert [type(item) for item in changed] == [Pair, Dict, str, Plain, list]
    assert [int(tensor) for tensor in tensors_in(changed, objects=True)] == [2, 3, 2, 2]
    assert (changed[0].right, changed[2], changed[4][0].hidden) == ("text", "text", None)
    assert int(value[3].logits[0]) == 1


def test_leaves_have_paths() -> None:
    parent, child = Plain(), Plain()
    parent.child, child.parent = child, parent  # type: ignore[attr-defined]
    value = {"pair": Pair(1, [None]), "output": Output("a", {"b": 2}), "parent": parent}
    found = dict(named_leaves(value, objects=True))
    assert [path for path in found if path.startswith("['parent']")] == [
        "['parent'].logits[0]",
        "['parent'].child.logits[0]",
    ]
    assert {path: leaf for path, leaf in found.items() if not path.startswith("['parent']")} == {
        "['pair'].left": 1,
        "['pair'].right[0]": None,
        "['output'].logits": "a",
        "['output'].hidden['b']": 2,
    }
