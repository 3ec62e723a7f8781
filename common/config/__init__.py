"""One YAML file -> objects: the signature of a constructor is its schema, and there is no registry.

A config names what it builds by import path, so it can call anything that Python can import: read one from a stranger
as you would read a program. Importing this package does not import torch; what a config names is imported by ``check``.
"""

from common.config.files import find
from common.config.tree import Config
from common.config.yaml12 import ConfigError

__all__ = ["Config", "ConfigError", "find"]
