"""Exceptions that are more specific than ValueError and TypeError."""


class ImplError(ValueError, NotImplementedError):
    """A named implementation cannot serve a call; the message says why.

    A ValueError because the argument ``impl`` is what does not fit, a NotImplementedError because another
    implementation may do the same work.
    """


class KVStoreError(RuntimeError):
    """A stored record of the KV history is missing, cannot be written or fails its check.

    Wrong bytes are never attended: the call that raises has changed nothing. ``layer``, ``row``, ``chunk`` and
    ``file`` say which record it was (None where none is meant). An exact way on: ``rewind(chunk * chunk_size, row)``
    and feed the tokens from there again.
    """

    def __init__(
        self,
        message: str,
        *,
        layer: int | None = None,
        row: int | None = None,
        chunk: int | None = None,
        file: str | None = None,
    ) -> None:
        super().__init__(message)
        self.layer, self.row, self.chunk, self.file = layer, row, chunk, file
