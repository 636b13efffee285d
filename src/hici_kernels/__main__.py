"""``python -m hici_kernels`` is the command ``hici``."""

from .cli.main import app

if __name__ == "__main__":
    app(prog_name="hici")
