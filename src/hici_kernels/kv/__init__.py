"""KV history of decoding."""

from .store import KVStore

__all__ = ["KVStore"]
