"""polyray: a census of polysemantic neurons.

`polyray.open(OUT)` gives the tables of a sweep; the `polyray` command runs one.
"""

from polyray.dataset import Dataset, open
from polyray.errors import PolyrayError

__version__ = "0.1.0"

__all__ = ["Dataset", "PolyrayError", "__version__", "open"]
