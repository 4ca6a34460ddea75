"""Links of the documents to files of the repository, and to headings in them."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]


def headings(document):
    """What GitHub calls the headings of a document in links."""
    lines = re.findall(r"^#+ (.+)$", document.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.stem)
def test_every_link_leads_somewhere(document):
    for target, heading in re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)[^)]*\)", document.read_text()):
        if "://" in target:
            continue
        file = document.parent / target if target else document
        assert file.exists(), target
        assert not heading or heading in headings(file), f"{target}#{heading}"
