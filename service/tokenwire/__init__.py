"""tokenwire: gRPC streaming LLM inference with its own compiled engine."""

from tokenwire._version import __version__

__all__ = ["__version__"]
