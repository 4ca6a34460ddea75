"""Which engines there are, by name: two of our own, and those of installed packages."""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points

from softgrpo.config.schema import ConfigError, did_you_mean

GROUP = "softgrpo.engines"


# Values are imported only when the engine is asked for.
_OWN = (
    EntryPoint("native", "softgrpo_engine.llm:LLM", GROUP),
    EntryPoint("hf", "softgrpo_engine.hf_engine:HFEngine", GROUP),
)


def find_engine(name: str) -> EntryPoint:
    """The engine of that name, not yet imported: native, hf, or an installed package's.

    A package offers one as ``[project.entry-points."softgrpo.engines"] name = "module:Class"``.
    Raises ConfigError that lists the names.
    """
    known = {point.name: point for point in (*entry_points(group=GROUP), *_OWN)}
    if name not in known:
        raise ConfigError(f"rollout.engine: no engine {name!r}{did_you_mean(name, sorted(known))}")
    return known[name]
