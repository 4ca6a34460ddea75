"""The configuration of a run. Its sections and their keys: `softgrpo.config.sections`."""

from softgrpo.config.config import Config
from softgrpo.config.schema import ConfigError
from softgrpo.config.sources import recipe_names

__all__ = ["Config", "ConfigError", "recipe_names"]
