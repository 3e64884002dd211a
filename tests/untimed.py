"""Hypothesis' ``given`` without limits of time: a machine that is busy with other work is no failure."""

from __future__ import annotations

from hypothesis import HealthCheck, given, settings

settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")

__all__ = ["given"]
