"""The version, in the only place that has it: the build reads the line below (see pyproject.toml)."""

__all__ = ["__version__"]

__version__ = "0.1.0"
