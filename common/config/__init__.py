"""One YAML file -> objects: the signature of a constructor is its schema, and there is no registry.

A config names what it builds by import path. One that was read from a file may name ``TRUSTED`` packages only, and
those that its reader trusts by name. Importing this package does not import torch; what a config names is imported by
``check``, and only read by ``check_unimported``.
"""

from common.config.build import TRUSTED
from common.config.files import find
from common.config.tree import Config
from common.config.yaml12 import ConfigError

__all__ = ["TRUSTED", "Config", "ConfigError", "find"]
