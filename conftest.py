"""What every test and every doctest of the package runs under (at the root, so that doctests see it too).

Imports of packages are inside the functions: the process that only distributes tests to others needs none.
"""

import logging
from collections.abc import Iterator
from typing import Any

import pytest


def pytest_collection_modifyitems() -> None:
    """Leave the structured trace of compilations off, which a handler of its logger turns on.

    pytest adds its handler to every logger that does not propagate.
    """
    import torch  # noqa: F401  # configures its loggers

    logging.getLogger("torch.__trace").propagate = True


@pytest.fixture(autouse=True)
def one_thread_and_one_seed() -> Iterator[None]:
    """One thread, so that sums do not depend on the machine; one seed, so that a failure comes again."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def names_for_doctests(request: pytest.FixtureRequest) -> None:
    """``torch``, ``nn``, a small convolutional ``model``, and a ``module`` with ``data`` to fit it on."""
    if not isinstance(request.node, pytest.DoctestItem):
        return
    import torch
    from torch import nn

    from tests.zoo import Boring

    names: dict[str, Any] = request.getfixturevalue("doctest_namespace")
    names.update(
        torch=torch,
        nn=nn,
        model=nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 8 * 8, 10)
        ),
        module=Boring(),
        data=Boring.data(),
    )
