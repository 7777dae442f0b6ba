"""A request that cannot even begin is under way no more: draining must not wait for it."""

from __future__ import annotations

import pytest

from cluster.core.errors import MoeError
from kit.router import LAYER, EchoPipeline, router


async def test_a_request_whose_span_cannot_be_opened_is_under_way_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        message = "no span"
        raise RuntimeError(message)

    async with router(EchoPipeline()) as rig:
        monkeypatch.setattr(rig.servicer._tracing, "span", broken)
        async with rig.client() as client:
            with pytest.raises(MoeError):
                await client.dispatch(rig.rows(), model=rig.model, layer=LAYER, timeout_s=1.0)
        assert rig.servicer.num_in_flight == 0
        assert await rig.servicer.wait_until_idle(1.0)
