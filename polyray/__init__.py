"""polyray: a census of polysemantic neurons."""

__version__ = "0.1.0"
