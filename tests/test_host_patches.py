"""Patches of an instance: stacked, undone in any order, copied and pickled with the instance."""

import copy
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest

from lightning_light.host.patches import InstancePatch, patches_of, wrap_method


class Owner:
    """What a user has."""

    factor = 10

    def scale(self, x: int) -> int:
        """Return the product."""
        return x * self.factor


def plus(term: int) -> Callable[..., Any]:
    return lambda original, x: original(x) + term


def test_a_patch_is_listed_and_undone() -> None:
    owner = Owner()
    patch = InstancePatch(owner, "factor", 3)
    assert (owner.scale(2), patches_of(owner), patch.original) == (6, [patch], 10)
    patch.undo()
    patch.undo()
    assert (owner.scale(2), vars(owner)) == (20, {})


def test_an_attribute_of_the_instance_is_put_back() -> None:
    owner = Owner()
    owner.factor = 2
    patch = InstancePatch(owner, "factor", 3)
    patch.undo()
    assert vars(owner) == {"factor": 2}


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_wrapped_methods_can_be_undone_in_any_order(order: tuple[int, ...]) -> None:
    owner, terms = Owner(), [1, 2, 4]
    patches = [wrap_method(owner, "scale", plus(term)) for term in terms]
    assert owner.scale(1) == 10 + sum(terms)
    assert owner.scale.__doc__ == "Return the product."
    for place in order:
        patches[place].undo()
        terms[place] = 0
        assert owner.scale(1) == 10 + sum(terms)
    assert vars(owner) == {}


def test_a_method_that_other_code_has_wrapped_since_passes_its_calls_through() -> None:
    owner = Owner()
    patch = wrap_method(owner, "scale", plus(1))
    inner = owner.scale
    owner.scale = lambda x: -inner(x)  # type: ignore[method-assign]
    patch.undo()
    assert owner.scale(1) == -10
    assert patches_of(owner) == [patch]
    assert not patch.active
    owner.scale = inner  # type: ignore[method-assign]
    later = wrap_method(owner, "scale", plus(2))
    assert owner.scale(1) == 12
    later.undo()
    assert vars(owner) == {}


def test_a_patch_goes_beneath_those_that_are_there() -> None:
    owner = Owner()
    above = wrap_method(owner, "scale", plus(1))
    beneath = InstancePatch(owner, "scale", lambda x: x, beneath=True)
    assert owner.scale(5) == 6
    beneath.undo()
    assert owner.scale(5) == 51
    again = InstancePatch(owner, "scale", lambda x: x, beneath=True)
    above.undo()
    assert owner.scale(5) == 5
    again.undo()
    assert vars(owner) == {}


def test_a_copy_has_patches_of_its_own() -> None:
    owner = Owner()
    patch = InstancePatch(owner, "factor", 3)
    copied = copy.deepcopy(owner)
    (own,) = patches_of(copied)
    patch.undo()
    assert (copied.factor, own.owner is copied) == (3, True)
    own.undo()
    assert vars(copied) == {}


def test_a_pickle_has_the_values_and_no_patches() -> None:
    owner = Owner()
    InstancePatch(owner, "factor", 3)
    loaded = pickle.loads(pickle.dumps(owner))
    assert (loaded.factor, patches_of(loaded)) == (3, [])
