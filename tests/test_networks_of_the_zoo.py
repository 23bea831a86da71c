"""The benchmark over published networks: its quick part works, and its check finds what is wrong."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_light.dependency import trace_dependencies
from lightning_light.example_input import ExampleInput
from tests.zoo import Plain


@pytest.fixture(scope="module")
def zoo() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
        import zoo

        yield zoo


def test_the_quick_networks_are_pruned_exactly(zoo) -> None:
    results = {name: zoo.cell(network, "prune") for name, network in zoo.QUICK.items()}
    assert {name: result["outcome"] for name, result in results.items()} == dict.fromkeys(zoo.QUICK, "works")


@pytest.mark.slow
def test_the_other_methods_run_on_the_quick_networks_and_results_are_stored(zoo, tmp_path, capsys) -> None:
    arguments = [str(tmp_path / "results.jsonl"), "--quick", "--columns", "mask", "quantize", "--limit", "60"]
    zoo.main(arguments)
    zoo.main([*arguments, "--again"])
    results = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert len(results) == 2 * len(zoo.QUICK), "what works is not run again"
    assert {result["outcome"] for result in results} == {"works"}
    assert f"| all | {len(zoo.QUICK)} | {len(zoo.QUICK)} / 0 / 0 / 0 |" in capsys.readouterr().out


def test_a_cut_that_is_not_exact_is_found(zoo) -> None:
    torch.manual_seed(0)
    net = Plain().double().eval()
    example = ExampleInput(*net.example)
    example = replace(example, args=tuple(arg.double() for arg in example.args))
    graph = trace_dependencies(net, example.args)
    kept = {"conv1": torch.arange(8) > 2}
    zoo.check_exact(net, example, graph, kept)
    groups = [
        replace(g, members=tuple(replace(m, index=m.index.roll(1)) for m in g.members[:1]) + g.members[1:])
        for g in graph.groups
    ]
    with pytest.raises(zoo.WrongError, match="outputs differ"):
        zoo.check_exact(net, example, replace(graph, groups=tuple(groups)), kept)
