"""No public callback without a row."""

import pytest

from lightning_light.errors import ManifestError
from lightning_light.schema import Context
from lightning_light.structured import StructuredPruning
from lightning_light.surgery.manifest import check_states
from tests.contract.table import CASES, public_callbacks


def test_every_public_callback_is_in_the_table(tmp_path) -> None:
    built = {type(callback) for case in CASES for callback in case.build(tmp_path)}
    missing = {callback.__name__ for callback in public_callbacks() - built}
    assert not missing, f"add a row to tests/contract/cases/<subpackage>.py for {sorted(missing)}"


def test_every_public_callback_has_a_row_for_every_contract(tmp_path) -> None:
    first = {type(case.build(tmp_path)[0]) for case in CASES if case.full}
    assert not public_callbacks() - first, "a row of its own, first in `build`, with `full=True`"


def test_what_is_public_is_found() -> None:
    assert StructuredPruning in public_callbacks()
    assert "CompressionCallback" not in {callback.__name__ for callback in public_callbacks()}


def test_names_are_unique() -> None:
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("callback", sorted(public_callbacks(), key=lambda cls: cls.__name__))
def test_a_state_that_the_method_cannot_have_is_refused(callback) -> None:
    with pytest.raises(ManifestError, match=f"damaged at .*{callback.method}.*: expected "):
        check_states({callback.method: {"surplus": 1}}, Context())
