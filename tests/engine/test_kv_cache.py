"""The page pool: who holds what, what is found again, and what never happens."""

import subprocess
import sys

import pytest

from softgrpo_engine.scheduling.kv_cache import PAGE_SIZE, BlockPool, OutOfPages


def tokens(pages, first=0):
    return list(range(first, first + pages * PAGE_SIZE))


def computed(pool, prompt):
    pages = [pool.allocate() for _ in range(-(-len(prompt) // PAGE_SIZE))]
    pool.cache_prefix(prompt, pages)
    return pages


def test_pages_run_out_and_come_back():
    pool = BlockPool(2)
    pages = [pool.allocate(), pool.allocate()]
    with pytest.raises(OutOfPages):
        pool.allocate()
    pool.release(pages)
    assert pool.num_free == 2
    pool.check()


def test_a_page_released_twice_is_an_error():
    pool = BlockPool(2)
    page = pool.allocate()
    pool.release([page])
    with pytest.raises(RuntimeError, match="more often than it is held"):
        pool.release([page])


def test_only_full_pages_of_the_same_prefix_are_found():
    pool = BlockPool(8)
    prompt = [*tokens(2), 7, 7, 7]
    pages = computed(pool, prompt)
    assert pool.find_prefix(prompt) == pages[:2]
    assert pool.find_prefix(prompt[:-4]) == pages[:1]
    other_start = [99, *prompt[1:]]
    assert pool.find_prefix(other_start) == []
    # The second page of the prompt is no first page.
    assert pool.find_prefix(prompt[PAGE_SIZE:]) == []


def test_unheld_prefix_survives_until_its_place_is_needed():
    pool = BlockPool(3)
    pages = computed(pool, tokens(2))
    pool.release(pages)
    assert pool.num_free == 3
    assert pool.find_prefix(tokens(2)) == pages
    pool.allocate()  # the page that was never used
    assert pool.find_prefix(tokens(2)) == pages
    pool.allocate()  # takes the end of the prefix first
    assert pool.find_prefix(tokens(2)) == pages[:1]


def test_a_prefix_in_use_is_never_evicted():
    pool = BlockPool(2)
    pages = computed(pool, tokens(1))
    pool.share(pages[0])
    pool.release(pages)
    pool.allocate()
    with pytest.raises(OutOfPages):
        pool.allocate()
    assert pool.find_prefix(tokens(1)) == pages


def test_new_weights_forget_every_prefix_held_or_not():
    pool = BlockPool(4)
    held = computed(pool, tokens(1))
    pool.release(computed(pool, tokens(1, first=50)))
    pool.clear()
    assert pool.find_prefix(tokens(1)) == []
    assert pool.find_prefix(tokens(1, first=50)) == []
    pool.check([held])
    pool.release(held)
    assert pool.num_free == 4
    # And the same prompt under the new weights is cached anew.
    again = computed(pool, tokens(1))
    assert pool.find_prefix(tokens(1)) == again


def test_the_same_prompt_computed_twice_is_cached_once():
    pool = BlockPool(4)
    first, second = computed(pool, tokens(2)), computed(pool, tokens(2))
    assert pool.find_prefix(tokens(2)) == first
    pool.release(second)
    pool.release(first)
    pool.check()


def test_check_finds_a_lost_page():
    pool = BlockPool(3)
    page = pool.allocate()
    with pytest.raises(RuntimeError, match="reference counts differ"):
        pool.check()
    pool.check([[page]])


def test_cache_and_scheduler_need_no_torch():
    code = """
import sys, types
package = types.ModuleType("softgrpo_engine"); package.__path__ = [sys.argv[1]]
sys.modules["softgrpo_engine"] = package
from softgrpo_engine.scheduling import kv_cache, scheduler, sequence
assert "torch" not in sys.modules and "numpy" not in sys.modules
"""
    import softgrpo_engine

    folder = softgrpo_engine.__path__[0]
    subprocess.run([sys.executable, "-c", code, folder], check=True)
