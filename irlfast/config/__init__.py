"""Every key of a run, what keys say of each other, and how they are read: YAML, the command line, recipes."""

from irlfast.config.read import difference, dump, load_config, make_config
from irlfast.config.schema import Config

__all__ = ["Config", "difference", "dump", "load_config", "make_config"]
