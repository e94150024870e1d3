"""The version of the package, in one place: setup.cfg and the code read it from here."""

__version__ = "0.1.0"
