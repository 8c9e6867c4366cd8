"""Pyramid Forcing: three kinds of heads keep, read and place their middle frames differently."""

from lightning_kv.policies.retain.pyramid.part import PyramidForcing
from lightning_kv.policies.retain.pyramid.reads import PyramidReads, PyramidTimes

__all__ = ["PyramidForcing", "PyramidReads", "PyramidTimes"]
