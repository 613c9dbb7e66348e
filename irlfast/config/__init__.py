"""The configuration: every key of a run, checks of the keys, and how they are read (YAML, command line, recipes)."""

from irlfast.config.read import difference, dump, load_config, make_config
from irlfast.config.schema import Config

__all__ = ["Config", "difference", "dump", "load_config", "make_config"]
