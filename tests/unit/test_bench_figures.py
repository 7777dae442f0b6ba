"""The benchmark's arithmetic: ceilings, fits, what a cluster would need, tables as Markdown."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from actors.core.codecs import FITTED_CODECS, PackedExpert, decode
from bench.abft import CLASSES, class_of, flip
from bench.failover_cost import OFF, VARIANTS, cost_of, spec_of
from bench.growth import Point, exponents_of
from bench.heap import Heap
from bench.leak import Look, section_of, slope_of
from bench.overload import Probe
from bench.processes import Usage
from bench.report import Figure, ceiling_of, verdicts
from bench.rows import Sample
from bench.saturation import saturation_tables, wire_bytes
from bench.settings import ECHO, IN_PROCESS, OURS, WIDE_MODEL, Case, Settings, Sizes
from bench.shadow_load import Sustained, _made_up
from bench.tables import Table
from cluster.core.descriptors import ExpertDescriptor


def figure(row: str, case: Case, *, p50_s: float = 0.001, tokens_per_s: float = 1000.0, caller_s: float = 0.0, server_s: float = 0.0) -> Figure:
    return Figure(case.name, row, "", p50_s, (p50_s, p50_s), p50_s, tokens_per_s, (tokens_per_s, tokens_per_s), caller_s, server_s, 1)


def test_the_ceiling_is_what_the_wire_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psutil.cpu_count", lambda: 2)
    one, many = Case(1, 8), Case(16, 8)
    assert ceiling_of(one, figure(IN_PROCESS, one, p50_s=0.004), figure(ECHO, one, p50_s=0.001)) == pytest.approx(1.25)
    reference, echo = figure(IN_PROCESS, many, tokens_per_s=16_000.0), figure(ECHO, many, caller_s=0.0002, server_s=0.0003)
    assert ceiling_of(many, reference, echo) == pytest.approx(0.001 / 0.0015)


@pytest.mark.parametrize(("ours_s", "is_reached"), [(0.005, True), (0.0053, False)])
def test_a_verdict_compares_with_its_goal(ours_s: float, is_reached: bool) -> None:
    case = Case(1, 8)
    figures = [figure(OURS, case, p50_s=ours_s), figure(IN_PROCESS, case, p50_s=0.004), figure(ECHO, case)]
    (found,) = verdicts(case, figures)
    assert found.is_reached is is_reached


def test_a_machine_whose_speed_drifts_changes_no_ratio() -> None:
    case, rounds = Case(1, 8), (0.004, 0.008, 0.006)
    ours = replace(figure(OURS, case, p50_s=0.006), rounds_p50_s=tuple(1.2 * p50_s for p50_s in rounds))
    theirs = replace(figure(IN_PROCESS, case, p50_s=0.004), rounds_p50_s=rounds)
    (found,) = verdicts(case, [ours, theirs, figure(ECHO, case)])
    assert found.text.startswith("1.20 x")
    assert found.is_reached


def test_hivemind_measured_elsewhere_is_named_as_such() -> None:
    case = Case(1, 8, WIDE_MODEL)
    (found,) = verdicts(case, [figure(OURS, case, p50_s=0.005)])
    assert "not measured here" in found.text


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 2.0])
def test_the_exponent_of_a_power_is_that_power(power: float) -> None:
    points = [Point(size, 0.001 * size**power, 1.0, 0.001, 100) for size in (1, 4, 16, 64)]
    assert exponents_of(points)["p50"] == pytest.approx(power)
    assert exponents_of(points)["router memory"] == pytest.approx(0.0)


def test_a_slope_is_that_of_the_line() -> None:
    assert slope_of([1, 2, 3], [5, 7, 9]) == pytest.approx(2.0)
    assert slope_of([1], [5]) == 0.0


@pytest.mark.parametrize(
    ("private", "used", "objects", "descriptors", "word"),
    [(0, 0, 0, 0, "yes"), (100, 0, 0, 0, "in use"), (100, 100, 0, 0, "NO"), (0, 0, 1, 0, "NO"), (0, 0, 0, 0.01, "NO")],
)
def test_what_grows_with_the_requests_is_a_leak_and_pages_alone_are_not(private: int, used: int, objects: int, descriptors: float, word: str) -> None:
    """Of bytes and objects in use, at half time and at the end, and of descriptors."""
    looks = []
    for n in range(1000, 9000, 1000):
        heaps = {"router 0": Heap(10**7 + n * used, 0, n * objects)} if n in (5000, 8000) else {}
        looks.append(Look(n, {"router 0": Usage(0, 10**7 + n * private, 0, 30 + int(n * descriptors), 5)}, 0, 0, heaps))
    section = section_of(looks, 1.0)
    assert section.tables[0].rows[0][-1] == word
    assert section.data["verdicts"]["router 0"]["is_steady"] is (word != "NO")


def test_without_a_look_at_the_heaps_the_pages_decide() -> None:
    looks = [Look(n, {"actor 0": Usage(0, 10**7 + n * 100, 0, 30, 5)}, 0, 0) for n in range(1000, 9000, 1000)]
    assert section_of(looks, 1.0).data["verdicts"]["actor 0"]["is_steady"] is False


def test_a_router_s_limit_is_its_cpu_time() -> None:
    sizes = Sizes()
    assert wire_bytes(sizes.hidden_size, 2) == 2 * 512 * 6
    found = saturation_tables({"32 x 512": (512, 10_000.0, 0.0256)}, sizes).data
    assert found["32 x 512"]["tokens_per_s_of_a_full_core"] == pytest.approx(20_000.0)
    assert found["32 x 512"]["router_cores"] == pytest.approx(0.5)


def test_recovery_begins_with_the_first_of_three_usual_answers() -> None:
    probe = Probe(rig=None, seen=[(9.0, 0.5, True), (10.1, 0.5, True), (10.6, 0.01, True), (10.7, 0.01, False), (10.8, 0.01, True), (10.9, 0.01, True)])  # type: ignore[arg-type]
    assert probe.recovery_s(10.0, 0.01) is None
    probe.seen.append((11.0, 0.01, True))
    assert math.isclose(probe.recovery_s(10.0, 0.01) or 0.0, 0.8)


def test_tables_become_markdown() -> None:
    assert Table("t", ("a", "b"), [("x|y", "1")], "n").markdown() == ["", "**t**", "", "| a | b |", "| --- | ---: |", "| x/y | 1 |", "", "n", ""]


def test_a_cost_compares_neighbours_of_the_same_round() -> None:
    off = [Sample([0.1], rate, 0.01, 0.01) for rate in (100.0, 200.0, 400.0)]
    own = [Sample([0.1], rate, 0.01, 0.02) for rate in (97.0, 196.0, 420.0)]
    cost = cost_of(Case(16, 8), VARIANTS[1], own, off)
    assert cost.ratio == pytest.approx(0.98)
    assert cost.ratio_spread == pytest.approx((0.97, 1.05))
    assert cost.cpu_ratio == pytest.approx(1.5)
    assert cost.is_reached
    assert cost_of(Case(16, 8), VARIANTS[2], own[:1], off[:1]).is_reached
    assert not cost_of(Case(16, 8), VARIANTS[1], own[:1], off[:1]).is_reached


def test_everything_that_has_a_switch_is_off_where_all_is_off(tmp_path: Path) -> None:
    for variant in VARIANTS:
        spec = spec_of(variant, Settings(), tmp_path)
        is_on = variant.name != OFF
        assert spec.hedging.enabled is is_on
        assert bool(spec.models[0].ladder) is bool(spec.models[0].shadow) is is_on
        assert spec.abft.fraction == variant.fraction


@pytest.mark.parametrize(("second_half", "ratio", "is_reached"), [(2000.0, 0.8, True), (2000.0, 0.79, False), (9000.0, 1.0, False)])
def test_half_a_load_is_sustained_when_it_is_answered_and_the_queue_does_not_grow(second_half: float, ratio: float, is_reached: bool) -> None:
    found = Sustained("int2", 13.3, 0.25, 1e4, 100, int(100 * ratio), ratio, 0.01, 0.02, 9000, 1000.0, second_half, 0.9)
    assert found.is_reached is is_reached


@pytest.mark.parametrize("codec", FITTED_CODECS)
def test_made_up_shadows_are_finite_and_of_the_right_shape(codec: str) -> None:
    expert = ExpertDescriptor(hidden_size=64, intermediate_size=128)
    made = _made_up(expert, FITTED_CODECS[codec], np.random.default_rng(0))
    restored = decode(PackedExpert(expert, FITTED_CODECS[codec], made))
    assert {name: array.shape for name, array in restored.items()} == expert.tensor_shapes()
    for array in restored.values():
        assert np.isfinite(array.astype(np.float32)).all()
        assert array.astype(np.float32).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_flip_is_of_the_bit_that_its_class_names(dtype: torch.dtype) -> None:
    one = torch.tensor([1.5, -3.25], dtype=dtype)
    seen = set()
    for bit in range(8 * dtype.itemsize):
        wrong = one.clone()
        flip(wrong, 1, bit)
        seen.add(class_of(bit, dtype))
        assert wrong[0] == one[0]
        if class_of(bit, dtype) == "sign":
            assert wrong[1] == -one[1]
        if class_of(bit, dtype).startswith("mantissa"):
            assert 0 < abs(float(wrong[1]) / float(one[1]) - 1) <= 0.5
        flip(wrong, 1, bit)
        assert torch.equal(wrong, one)
    assert seen == {*CLASSES}
