"""What a terminal shows of the main job, on the emulated screen."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.terminal_script import MARKER

pyte = pytest.importorskip("pyte")

SCRIPT = [sys.executable, "-W", "ignore", "-m", "tests.terminal_script"]
ENVIRONMENT = {**os.environ, "TERM": "xterm-256color", "OMP_NUM_THREADS": "1"}
EVENTS = [
    *(rf"structured pruning {n}/10: MACs \d+ %, \d+ channels? removed from \d layers?" for n in range(1, 11)),
    r"weight pruning: sparsity 0\.\d\d, \d+ dead filters?",
    r"quantization aware training: observing 5 layers",
    r"quantization aware training: enabled after 2 calibration batches",
    r"mobile export: model\.ptl, \S+kB, \S+ ms per sample",
]
HOSTS_OWN = ("`Trainer", "GPU available", "TPU available", "💡 Tip", "Sanity")


def in_a_terminal(*jobs: str) -> bytes:
    """Run the script on a pseudo terminal; return what it has written."""
    leader, follower = os.openpty()
    process = subprocess.Popen(
        [*SCRIPT, *jobs], stdin=follower, stdout=follower, stderr=follower, env=ENVIRONMENT, close_fds=True
    )
    os.close(follower)
    written = b""
    while chunk := _read(leader):
        written += chunk
    os.close(leader)
    assert process.wait() == 0, written.decode()[-2000:]
    return written


def _read(leader: int) -> bytes:
    try:
        return os.read(leader, 1 << 16)
    except OSError:  # the other end is closed
        return b""


def screen_of(written: bytes, columns: int) -> list[str]:
    screen = pyte.Screen(columns, 400)
    pyte.ByteStream(screen).feed(written)
    return [line.rstrip() for line in screen.display if line.strip()]


def check(screen: list[str], columns: int) -> None:
    """Each event is one whole line of its own; so is each line of the table."""
    found = [line for line in screen if re.match("structured|weight|quantization|mobile", line)]
    assert found
    for line in found:
        assert any(re.fullmatch(pattern, line) for pattern in EVENTS), line
    assert len({re.sub(r" [\d.]+ ms", "", line) for line in found}) == len(found), "repeated"
    for words in ("structured pruning", "weight pruning", "quantization aware", "mobile export"):
        assert all(line.startswith(words) for line in screen if words in line), words
    (title,) = [place for place, line in enumerate(screen) if line.strip() == "Compression: before → after"]
    table = screen[title + 1 :]
    header, end = table[0].split(), next(place for place, line in enumerate(table) if line.startswith("  remaining"))
    assert header[:1] == ["layer"]
    assert {"size", "bits", "sparsity", "MACs"} <= set(header)
    assert [line.split()[0] for line in table[2 : end - 1]][-1] == "(3"
    assert all(len(line) <= columns for line in table[:end])


@pytest.mark.slow
def test_no_line_collides_with_a_progress_bar_in_a_terminal() -> None:
    jobs = [f"{bar}:{columns}" for columns in (80, 120) for bar in ("rich", "tqdm", "none")]
    parts = in_a_terminal(*jobs).split(MARKER.encode())[1:]
    assert len(parts) == len(jobs)
    for job, part in zip(jobs, parts, strict=True):
        columns = int(job.partition(":")[2])
        screen = screen_of(part, columns)
        check(screen, columns)
        shown = " ".join(screen)
        assert "compression/" not in shown
        if job == "tqdm:120":  # what has changed, under short names
            assert all(re.search(pattern, shown) for pattern in (r"macs=0\.[34]", r"sparsity=0\.5", r"bits=8\.\d+"))


@pytest.mark.slow
def test_no_line_collides_with_a_progress_bar_in_a_pipe(tmp_path: Path) -> None:
    both = subprocess.run(
        [*SCRIPT, "rich:80", "tqdm:80", "none:80"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=ENVIRONMENT,
        check=True,
    ).stdout
    for part in both.split(MARKER.encode())[1:]:
        check(screen_of(part.replace(b"\n", b"\r\n"), 1000), 1000)
