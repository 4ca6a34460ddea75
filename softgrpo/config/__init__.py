"""The configuration of a run. Its sections and their keys: `softgrpo.config.sections`."""

from softgrpo.config.config import Config, ConfigFile
from softgrpo.config.schema import ConfigError
from softgrpo.config.sources import recipe_names
from softgrpo.config.supervised import SupervisedConfig

__all__ = ["Config", "ConfigError", "ConfigFile", "SupervisedConfig", "recipe_names"]
