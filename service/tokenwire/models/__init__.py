"""Model files: known by name, found by reference, pulled, verified and kept in the user's cache."""

from tokenwire.models.cache import cache_dir
from tokenwire.models.download import Progress
from tokenwire.models.errors import ModelSourceError
from tokenwire.models.manifest import MANIFEST, Model
from tokenwire.models.store import pull, resolve

__all__ = ["MANIFEST", "Model", "ModelSourceError", "Progress", "cache_dir", "pull", "resolve"]
