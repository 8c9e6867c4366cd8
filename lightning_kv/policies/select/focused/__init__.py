"""Read the frames that the queries look at and that are unlike the rest: Focused Forcing.

How frames are scored (:mod:`.scores`), the form for models that denoise chunk by chunk
(:mod:`.chunkwise`) and the one for several chunks in flight (:mod:`.rolling`).
"""

from lightning_kv.policies.select.focused.chunkwise import Focused
from lightning_kv.policies.select.focused.rolling import FocusedRolling

__all__ = ["Focused", "FocusedRolling"]
