"""Which releases of transformers these integrations are tested with."""

from __future__ import annotations

OLDEST = (5, 14)
NEWEST = (5, 23)


def check() -> None:
    """Raise ImportError where transformers is missing or outside the tested range."""
    wanted = f"transformers >={OLDEST[0]}.{OLDEST[1]},<{NEWEST[0]}.{NEWEST[1] + 1}"
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise ImportError(
            f"hici_kernels.integrations needs {wanted}: pip install 'hici-kernels[transformers]'"
        ) from error
    found = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if not OLDEST <= found <= NEWEST:
        raise ImportError(
            f"hici_kernels.integrations needs {wanted}, found transformers {transformers.__version__}: its attention "
            "and cache interfaces change between releases, and this one is not tested"
        )
