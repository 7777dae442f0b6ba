"""The page of what each single lost expert costs: every expert and codec stands there, the worst is named, and what is missing leaves a gap.

A run that was ended goes on where it was.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest

from examples.shadow_experts import DROPPED, Cell, Progress, cells, columns, draw, page, write_report
from router_service.calibration.shadows import ExpertShadows
from router_service.calibration.subject import Loss

PLACES = ((0, 0), (0, 1), (2, 1))


def report(titles: list[str]) -> dict[str, object]:
    found = [Cell(*place, title, 13.0, 0.25, 0.96, number + place[0]) for place in PLACES for number, title in enumerate(titles)]
    usage = {f"{layer}/{index}": 0.125 for layer, index in PLACES}
    return {"scored_bytes": 12_000, "bits_per_byte": 1.6, "calibration_rows": 100, "usage": usage, "cells": [asdict(cell) for cell in found]}


def test_the_page_has_every_expert_in_every_codec(tmp_path: Path) -> None:
    titles = [DROPPED, *columns()]
    made = report(titles)
    lines = page(made)
    for number, title in enumerate(titles):
        assert f"| {title} | 13.0 % | 0.250 | 0.9600 | {number + 2 / 3:+.4f} % | {number + 2:+.3f} % | 2/1 |" in lines
    for layer, index in PLACES:
        assert sum(line.startswith(f"| {layer}/{index} | 12.5 % |") for line in lines) == 3
    draw(made, tmp_path / "by_expert.png")
    assert (tmp_path / "by_expert.png").stat().st_size > 1000


def test_an_expert_that_no_text_reached_has_no_fitted_shadows_and_is_scored_without() -> None:
    asked: list[Loss] = []

    def rise(loss: Loss) -> float:
        asked.append(loss)
        return 1.0

    scorer = SimpleNamespace(subject=None, rise=rise)
    (only,) = cells(scorer, [ExpertShadows((3, 1), 0.0, 0.0, {})])
    assert (only.layer, only.index, only.codec, only.bits_per_byte_percent) == (3, 1, DROPPED, 1.0)
    assert [loss.lost for loss in asked] == [[(3, 1)]]


def test_a_run_that_was_ended_goes_on_where_it_was_on_the_same_facts_only(tmp_path: Path) -> None:
    facts = {"scored_bytes": 12_000, "bits_per_byte": 1.6, "calibration_rows": 100}
    scorer = SimpleNamespace(subject=None, rise=lambda _loss: 2.0)

    def made(done: Progress, *, ends_at: tuple[int, int] | None = None) -> Iterator[ExpertShadows]:
        for place in PLACES:
            if place == ends_at:
                raise KeyboardInterrupt
            if place not in done.usage:
                yield ExpertShadows(place, 0.25, 0.0, {})

    begun = Progress(tmp_path, facts)
    with pytest.raises(KeyboardInterrupt):
        write_report(begun, scorer, made(begun, ends_at=PLACES[2]))
    assert Progress(tmp_path, facts | {"calibration_rows": 200}).usage == {}
    again = Progress(tmp_path, facts)
    assert [*again.usage] == [*PLACES[:2]]
    scorer.rise = lambda _loss: 3.0
    again.cells[PLACES[0]].extend(Cell(*PLACES[0], title, 13.0, 0.25, 0.96, 1.0) for title in columns())
    write_report(again, scorer, made(again))
    report = json.loads((tmp_path / "by_expert.json").read_text())
    assert {cell["bits_per_byte_percent"] for cell in report["cells"] if cell["codec"] == DROPPED} == {2.0, 3.0}
    assert [*report["usage"]] == ["0/0", "0/1", "2/1"]
    assert "| 2/1 | 25.0 % | +3.000 |" in (tmp_path / "by_expert.md").read_text()
    assert Progress(tmp_path, facts).usage == {}
