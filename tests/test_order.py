"""Which method may act before which other."""

from itertools import pairwise

import pytest

import lightning_light as ll
from lightning_light.errors import OrderError
from lightning_light.order import DEFAULT_WINDOWS, Stage, check_order

DISTILL = ("Distill", Stage.DISTILLATION, None)
EXPORT = ("Export", Stage.EXPORT, None)
MONITOR = ("Monitor", Stage.MONITORS, None)


def prune(start=0.1, end=0.5):
    return ("Prune", Stage.STRUCTURED, (start, end))


def mask(start=0.5, end=0.6):
    return ("Mask", Stage.MASKS, (start, end))


def quantize(start=0.7, end=1.0):
    return ("Quantize", Stage.QUANTIZATION, (start, end))


@pytest.mark.parametrize(
    "items",
    [
        [],
        [prune()],
        [DISTILL, prune(), mask(), quantize(), EXPORT, MONITOR],
        [MONITOR, quantize(), mask(0.55), prune(), DISTILL],  # the windows say when, the list need not
        [prune(), prune(0.3, 0.9)],  # two of one stage are their own affair
        [prune(0.1, 0.5), mask(0.5, 0.6)],
        [("Factor", Stage.FACTORS, None), quantize()],
        [MONITOR, EXPORT],
    ],
)
def test_good_orders_pass(items) -> None:
    check_order(items)


@pytest.mark.parametrize(
    ("items", "found"),
    [
        ([prune(0.1, 0.8), quantize(0.7)], "Quantize beginning at 70% of the run, while Prune continues until 80%"),
        ([mask(0.0, 0.2), prune(0.1, 0.3)], "Mask beginning at 0% of the run, while Prune continues until 30%"),
        ([mask(0.5, 0.6), prune(0.1, 0.5)], "Mask before Prune in the list, and both acting at 50% of the run"),
        ([EXPORT, quantize()], "Export before Quantize in the list"),
        ([("Factor", Stage.FACTORS, None), prune()], "Factor before Prune in the list"),
    ],
)
def test_bad_orders_are_told_with_the_right_one(items, found) -> None:
    with pytest.raises(OrderError) as caught:
        check_order(items)
    listed = ", ".join(name for name, _, _ in items)
    right = ", ".join(name for name, _, _ in sorted(items, key=lambda item: item[1]))
    assert str(caught.value).startswith(f"`callbacks=[{listed}]`: expected {right} in this order")
    assert found in str(caught.value)


def test_the_right_order_leaves_out_who_may_stand_anywhere() -> None:
    with pytest.raises(OrderError, match=r"expected Prune, Quantize in this order"):
        check_order([MONITOR, quantize(0.2), DISTILL, prune()])


def test_default_windows_follow_one_another() -> None:
    items = [(stage.name, stage, window) for stage, window in DEFAULT_WINDOWS.items()]
    check_order(items)
    for (_, early), (_, late) in pairwise(sorted(DEFAULT_WINDOWS.items())):
        assert 0.0 < early[0] <= early[1] <= late[0] <= late[1] <= 1.0


def test_a_stage_of_a_user_stands_between_two_of_ours() -> None:
    own = ("Own", Stage.MASKS + 5, (0.5, 0.6))
    check_order([prune(0.1, 0.4), mask(0.4, 0.5), own, quantize()])
    with pytest.raises(OrderError, match="expected Prune, Own in this order"):
        check_order([own, prune(0.5, 0.8)])
    with pytest.raises(OrderError, match="Quantize beginning at 10% of the run, while Own continues until 60%"):
        check_order([own, quantize(0.1)])


def test_the_default_windows_of_the_callbacks_follow_one_another() -> None:
    callbacks = [
        ll.KnowledgeDistillation("self"),
        ll.StructuredPruning(ll.MACs(0.5)),
        ll.WeightPruning(ll.Sparsity(0.5)),
        ll.LowRankFactorization(ll.MACs(0.4)),
        ll.WeightClustering(8),
        ll.QuantizationAwareTraining(),
        ll.CompressionMonitor(),
        ll.MobileExport("model.ptl"),
    ]
    check_order([(type(one).__name__, one.stage, one.window(10)) for one in callbacks])
    starts = [window[0] for one in callbacks if (window := one.window(10)) is not None]
    assert len(starts) == 5
    assert starts == sorted(starts)
