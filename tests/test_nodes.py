"""Beyond one machine: two nodes on this one, and parameters that are sharded over two ranks."""

import json
import os
import socket
import subprocess
import sys
from typing import Any

import pytest

from tests.test_kill import ROOT, script

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def two_nodes(*arguments: Any) -> None:
    """Start one torchrun per node."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    rendezvous = ["--nnodes=2", "--nproc-per-node=1", "--master-addr=127.0.0.1", f"--master-port={port}"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", *rendezvous]
    nodes = [
        subprocess.Popen(
            [*torchrun, f"--node-rank={node}", "-m", "tests.nodes_script", *map(str, arguments)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for node in (0, 1)
    ]
    for node in nodes:
        _, errors = node.communicate(timeout=400)
        assert node.returncode == 0, errors[-3000:]


def test_two_nodes_end_equal_and_resume(tmp_path) -> None:
    two_nodes(tmp_path, "whole")
    two_nodes(tmp_path, "resumed", tmp_path / "step=7.ckpt")
    ends = [
        json.loads((tmp_path / f"{end}-{rank}.json").read_text()) for end in ("whole", "resumed") for rank in (0, 1)
    ]
    assert all(end == ends[0] for end in ends)
    assert (ends[0]["nodes"], ends[0]["steps"], len(ends[0]["edit_log"])) == (2, 12, 1)
    files = [(tmp_path / end / "model.ptl").read_bytes() for end in ("whole", "resumed")]
    assert files[0] == files[1]


def test_a_compressed_network_is_sharded_and_what_cannot_follow_is_refused_by_name(tmp_path) -> None:
    found = json.loads(script("sharded_script", tmp_path).splitlines()[-1])
    assert found["differs"] == []
    assert found["stem"] < 8
    checkpoint = found["refused"].pop("checkpoint")
    assert "Build it by `lightning_light.load_from_checkpoint(...)`" in checkpoint
    assert len(found["refused"]) >= 13
    for method, refusal in found["refused"].items():
        assert refusal.startswith(f"UnsupportedError: `{method}` with `ModelParallelStrategy`: expected a strategy")
