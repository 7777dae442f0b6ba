"""Who is calling: the tenant of the call that the current task serves."""

from __future__ import annotations

from contextvars import ContextVar

from router_service.auth import OPEN_TENANT

tenant_of_call: ContextVar[str] = ContextVar("moelastic_tenant", default=OPEN_TENANT)
