from hici_kernels import *  # noqa: F403
from hici_kernels import __version__ as __version__
