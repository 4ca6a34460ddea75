"""What an import says where TRL is another one, or is not there."""

import importlib.metadata
import sys

import pytest


@pytest.mark.parametrize(
    ("installed", "said"),
    [
        (None, "softgrpo.trl needs TRL: pip install 'softgrpo[trl]'"),
        (
            "1.17.0",
            "softgrpo.trl is written for TRL 1.16, and 1.17.0 is installed: "
            "pip install 'trl>=1.16,<1.17'",
        ),
    ],
)
def test_another_trl_is_one_line(installed, said, monkeypatch):
    def version(name):
        if installed is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.delitem(sys.modules, "softgrpo.trl", raising=False)
    with pytest.raises(ImportError) as error:
        importlib.import_module("softgrpo.trl")
    assert str(error.value) == said
