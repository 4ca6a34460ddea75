"""Pages of the KV cache: who holds them, and which prompt prefix they contain. No torch here."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

PAGE_SIZE = 16


class OutOfPages(Exception):
    """No page is free; the scheduler preempts a sequence."""


class BlockPool:
    """Reference-counted pages with a prefix cache over full prompt pages.

    A cached page is found again by its content: the serial number of the page before it and its own
    token ids, compared exactly. Only prompt pages are ever cached: a generated soft position is not
    determined by any token id. A cached page that nobody holds stays until its place is needed.
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._references = [0] * num_pages
        self._serial = 0
        self._root = 0
        self._page_of: dict[tuple[int, tuple[int, ...]], int] = {}
        self._key_of: dict[int, tuple[int, tuple[int, ...]]] = {}
        self._serial_of: dict[int, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # cached, unheld, oldest first

    @property
    def num_free(self) -> int:
        """Pages that ``allocate`` can give."""
        return len(self._free) + len(self._idle)

    def allocate(self) -> int:
        """A page held once. Raises OutOfPages."""
        if self._free:
            page = self._free.pop()
        elif self._idle:
            page, _ = self._idle.popitem(last=False)
            self._forget(page)
        else:
            raise OutOfPages
        self._references[page] = 1
        return page

    def share(self, page: int) -> None:
        """Holds a page once more."""
        self._idle.pop(page, None)
        self._references[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """Gives pages back; the last of a prefix becomes reusable first."""
        for page in reversed(list(pages)):
            if self._references[page] <= 0:
                raise RuntimeError(f"page {page} is released more often than it is held")
            self._references[page] -= 1
            if self._references[page] == 0:
                if page in self._key_of:
                    self._idle[page] = None
                else:
                    self._free.append(page)

    def find_prefix(self, tokens: Sequence[int]) -> list[int]:
        """Cached pages that hold the start of ``tokens``; not yet held by the caller."""
        pages: list[int] = []
        parent = self._root
        for start in range(0, len(tokens) - PAGE_SIZE + 1, PAGE_SIZE):
            page = self._page_of.get((parent, tuple(tokens[start : start + PAGE_SIZE])))
            if page is None:
                break
            pages.append(page)
            parent = self._serial_of[page]
        return pages

    def cache_prefix(self, tokens: Sequence[int], pages: Sequence[int]) -> None:
        """Makes the full pages of a computed prompt findable. ``pages[i]`` holds page i of it."""
        parent = self._root
        for i in range(len(tokens) // PAGE_SIZE):
            key = (parent, tuple(tokens[i * PAGE_SIZE : (i + 1) * PAGE_SIZE]))
            page = self._page_of.get(key)
            if page is None:
                page = pages[i]
                if page in self._key_of:
                    return  # the page is findable under an older parent
                self._serial += 1
                self._page_of[key], self._key_of[page] = page, key
                self._serial_of[page] = self._serial
            parent = self._serial_of[page]

    def clear(self) -> None:
        """Forgets every prefix (the weights changed); held pages stay held."""
        self._free.extend(self._idle)
        self._idle.clear()
        self._page_of.clear()
        self._key_of.clear()
        self._serial_of.clear()
        self._serial += 1
        self._root = self._serial

    def check(self, holders: Iterable[Sequence[int]] = ()) -> None:
        """Raises RuntimeError unless the pages of ``holders`` account for every reference."""
        expected = [0] * self.num_pages
        for pages in holders:
            for page in pages:
                expected[page] += 1
        if expected != self._references:
            raise RuntimeError("KV cache: reference counts differ from the pages that are held")
        unheld = set(self._free) | set(self._idle)
        if len(unheld) != self.num_free or any(self._references[page] for page in unheld):
            raise RuntimeError("KV cache: a page is free twice, or free and held")
        if len(unheld) + sum(count > 0 for count in self._references) != self.num_pages:
            raise RuntimeError("KV cache: a page was lost")

    def _forget(self, page: int) -> None:
        del self._page_of[self._key_of.pop(page)]
        del self._serial_of[page]
