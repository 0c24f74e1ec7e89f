"""The version; every module can import it from here."""

__version__ = "0.1.0"
