"""Progress bars are shown to people, and to nobody else."""

import io
import sys

import pytest

from lightning_light.progress_bar import with_progress_bar


@pytest.mark.parametrize(("module", "shown"), [("ipykernel.iostream", True), ("io", False)])
def test_bars_are_shown_in_a_notebook_and_not_in_a_pipe(
    monkeypatch: pytest.MonkeyPatch, module: str, shown: bool
) -> None:
    stream = type("OutStream", (io.StringIO,), {"__module__": module})()
    monkeypatch.setattr(sys, "stderr", stream)
    assert list(with_progress_bar(range(3), 3, "sensitivity", shown=True)) == [0, 1, 2]
    assert ("sensitivity" in stream.getvalue()) == shown
