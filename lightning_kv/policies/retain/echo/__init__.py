"""Echo-Forcing: first frames that roll, and rows that queries to come will want."""

from lightning_kv.policies.retain.echo.part import EchoForcing

__all__ = ["EchoForcing"]
