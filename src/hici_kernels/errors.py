"""Exceptions that are more specific than ValueError and TypeError."""


class ImplError(ValueError, NotImplementedError):
    """A named implementation cannot serve a call; the message says why.

    A ValueError because the argument ``impl`` is what does not fit, a NotImplementedError because another
    implementation may do the same work.
    """


class KVStoreError(RuntimeError):
    """A stored record of the KV history is missing or fails its check; wrong bytes are never attended."""
