"""What a row of the contract table says."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.contract.bodies import Body


@dataclass(frozen=True)
class Case:
    """One set-up of a method, small enough for a run of twelve steps (three epochs of four batches).

    Attributes:
        name: unique; it is the test's id.
        build: new callbacks for one run; files go below the folder. The method under test comes first.
        body: the network and its training; knows nothing of the method.
        structural: shapes or modules change during the run: what is compared must have changed.
        no_effect: the same method, set up so that it finds nothing to do; it must warn by name. None for methods that
            always have something to do.
        refuses: contract -> pattern of the sentence that refuses it. The names of contracts are those of the tests:
            ``manual``, ``frozen``, ``tied``, ``configure_model``, ``compiled``, ``wrapped``, ``ema``, ``swa``,
            ``fp16``, ``bf16``, ``accumulation``, ``clipping``, ``fast_dev_run``, ``second_fit``, ``resume``,
            ``export``, ``ddp``.
        plant: makes a callback decide otherwise than its equals on other ranks, which every rank must notice; for
            structural methods.
        tolerance: how far the outputs of the exported file may differ from the module's.
        full: run every contract; False for variants of a method that only have to fit, resume and round-trip. The first
            full row of a method is fast, further ones are slow.
    """

    name: str
    build: Callable[[Path], list[Any]]
    body: type[Body] = Body
    structural: bool = True
    no_effect: Callable[[Path], list[Any]] | None = None
    refuses: Mapping[str, str] = field(default_factory=dict)
    plant: Callable[[Any], None] | None = None
    tolerance: float = 1e-4
    full: bool = True

    def __str__(self) -> str:
        """The test's id."""
        return self.name
