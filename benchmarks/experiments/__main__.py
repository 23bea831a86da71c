"""The command line: ``python -m benchmarks.experiments``."""

import argparse
import fnmatch
from functools import partial
from pathlib import Path

import torch

from benchmarks.experiments import page
from benchmarks.experiments.harness import RESULTS, Job, run_missing
from benchmarks.experiments.table import CONVERGED, EXPERIMENTS, PROFILES, SHORTCUTS
from benchmarks.experiments.tasks import CIFARResNet, ConvergedCNN, FashionCNN, FashionViT, from_environment


def jobs(args: argparse.Namespace) -> list[Job]:
    """Return what is selected, the first seed of all experiments first."""
    profile = PROFILES[args.profile]
    tasks = {
        "cnn": FashionCNN(args.work, args.data),
        CONVERGED: ConvergedCNN(args.work, args.data),
        "vit": FashionViT(args.work, args.data),
        "resnet": CIFARResNet(profile.depth, args.cifar10, args.weights, args.teacher_weights),
        SHORTCUTS: CIFARResNet(profile.depth, args.cifar10, args.weights, convolution=True),
    }
    found = [
        Job(
            experiment,
            tasks[experiment.network],
            profile.epochs[experiment.network] if experiment.epochs is None else experiment.epochs,
            seed,
            args.results / args.profile,
        )
        for experiment in EXPERIMENTS
        for seed in range(profile.seeds[experiment.network])
    ]
    selected = [job for job in found if fnmatch.filter((job.experiment.name, job.path.stem), args.only)]
    return sorted(selected, key=lambda job: (job.experiment.network, job.seed))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.experiments", description=__doc__)
    parser.add_argument("command", choices=("run", "page"), help="run what is missing, or write the page")
    parser.add_argument("--profile", choices=PROFILES, default="cpu", help="how much is trained")
    parser.add_argument("--only", default="*", help="pattern of names, with or without seed: 'gates*', '*-2'")
    parser.add_argument("--list", action="store_true", help="list the experiments and seeds that are missing")
    parser.add_argument("--data", help="Fashion-MNIST; by default the part that ships with the examples")
    parser.add_argument("--cifar10", type=Path, default=from_environment("CIFAR10"), help="an .npz file")
    parser.add_argument("--weights", type=Path, default=from_environment("CIFAR10_WEIGHTS"), help="of the ResNet")
    parser.add_argument(
        "--teacher-weights", type=Path, default=from_environment("CIFAR10_TEACHER"), help="of ResNet-56"
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--work", type=Path, default=Path("runs/experiments"), help="starting weights and files")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.list:
        for job in jobs(args):
            print(f"{job.path.stem}: {'done' if job.done() else 'missing'}")
    elif args.command == "run":
        run_missing(jobs(args), args.work, partial(print, flush=True))
    else:
        page.write(args.results / args.profile)


if __name__ == "__main__":
    main()
