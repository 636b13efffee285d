from hici_kernels import *  # noqa: F403
from hici_kernels import __version__ as __version__
from hici_kernels import apply_hga as apply_hga
from hici_kernels import apply_hici as apply_hici
from hici_kernels import load_hici as load_hici
from hici_kernels import merge_hici as merge_hici
from hici_kernels import restore as restore
from hici_kernels import save_hici as save_hici
