"""The version: what this was installed as, of which the tag in git is the source (setup.py)."""

from importlib.metadata import PackageNotFoundError, version

UNINSTALLED = "0.2.0.dev0"  # of sources without tags; later than what was released last

try:
    __version__ = version("syncbn")
except PackageNotFoundError:  # imported from its sources
    __version__ = UNINSTALLED
