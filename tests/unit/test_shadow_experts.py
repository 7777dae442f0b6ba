"""The page of what each single lost expert costs: every expert and codec stands there, the worst is named, and a codec that is missing leaves a gap."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

from examples.shadow_experts import DROPPED, Cell, cells, columns, draw, page
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
