"""TRL's GRPO trainer on soft-thinking rollouts: `SoftGRPOTrainer` (extra `trl`)."""

from importlib.metadata import PackageNotFoundError, version

try:
    _installed = version("trl")
except PackageNotFoundError:
    raise ImportError("softgrpo.trl needs TRL: pip install 'softgrpo[trl]'") from None
if _installed.split(".")[:2] != ["1", "16"]:  # whose private methods are overridden
    raise ImportError(
        f"softgrpo.trl is written for TRL 1.16, and {_installed} is installed: "
        "pip install 'trl>=1.16,<1.17'"
    )

from softgrpo.config.rollout import SoftConfig
from softgrpo.trl.trainer import SoftGRPOTrainer

__all__ = ["SoftConfig", "SoftGRPOTrainer"]
