"""Future Forcing: keep what the queries to come will ask for, once."""

from lightning_kv.policies.retain.future.part import Future

__all__ = ["Future"]
