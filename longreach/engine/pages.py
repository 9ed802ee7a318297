"""Who holds which page: reference counts over numbered things, without the things.

    pool = PagePool(1024)
    page = pool.take(); pool.retain(page); pool.release(page); pool.release(page)    free again

Invariant after every call: `free_count` pages have no holder, all others have at least one, and the two add up to `count`.
State blocks (one holder each) are counted the same way.
"""

from __future__ import annotations


class OutOfPages(RuntimeError):
    """No page is free. Never reaches a user: the scheduler evicts, pre-empts or waits."""


class PagePool:
    """`count` pages, all free at first. The lowest recently freed page is handed out again first."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._free = list(range(count - 1, -1, -1))
        self._holders = [0] * count

    @property
    def free_count(self) -> int:
        return len(self._free)

    def holders(self, page: int) -> int:
        """How many hold this page."""
        return self._holders[page]

    def take(self) -> int:
        """A free page, held once.

        Raises:
            OutOfPages: there is none.
        """
        if not self._free:
            raise OutOfPages(f"all {self.count} pages are held")
        page = self._free.pop()
        self._holders[page] = 1
        return page

    def retain(self, page: int) -> None:
        """One holder more."""
        assert self._holders[page] > 0, f"page {page} is free and cannot be shared"
        self._holders[page] += 1

    def release(self, page: int) -> bool:
        """One holder less. Returns whether the page is free now."""
        assert self._holders[page] > 0, f"page {page} was released more often than held"
        self._holders[page] -= 1
        if self._holders[page]:
            return False
        self._free.append(page)
        return True
