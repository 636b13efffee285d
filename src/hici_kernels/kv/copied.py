"""An independent copy of a store whose records are in memory: what ``copy.deepcopy`` makes."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .store import KVStore

#: Records that are copied at once.
AT_ONCE = 256


def fill(new: KVStore, old: KVStore) -> None:
    """Into ``new``, made with the same arguments and empty, everything that ``old`` holds."""
    engine = old._engine
    for target, source in zip(new._layers, old._layers, strict=True):
        target.reserve_records(source.records.shape[1])
        target.records = source.records.clone()
        for name, x in source.buffers.items():
            new._meter.require("device", x.nbytes, f"a copy of {name} of layer {source.number}")
            target.buffers[name] = x.clone()  # keeps the order of the heads in memory
            target._enter(name, x.nbytes)
        target.lengths, target.base = source.lengths.clone(), source.base.clone()
        target.columns = [c.copy() for c in source.columns]
    if engine is None:
        return
    copied = new._build(engine.layout.query_heads)
    copied.records.restore(engine.records)
    new._meter.set("host", "records list", copied.records.nbytes)
    held = (engine.records.shares > 0).nonzero().flatten()
    for records in held.split(AT_ONCE) if len(held) else ():
        pages = engine.tier.pages(engine.records.pages_of(records).flatten())
        copied.tier.write(records, pages.unflatten(0, (len(records), -1)))
