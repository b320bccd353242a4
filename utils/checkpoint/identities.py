"""Whether the names of two lists of identities can be compared: a package without names has label numbers for names."""

from __future__ import annotations

from collections.abc import Sequence


def can_be_compared(stored: Sequence[str], given: Sequence[str]) -> bool:
    """Whether equal names are one person, and different ones two.

    Not if one list has the label numbers 0, 1, 2, ... in place of names: of which people they are, the other list does
    not say. But where --exclude has removed some of the numbers, those that are left tell which ones.
    """
    if not stored or not given:
        return False
    without_names = [_are_labels(stored), _are_labels(given)]
    return not any(without_names) or not all(without_names) and _are_numbers(stored) and _are_numbers(given)


def _are_labels(identities: Sequence[str]) -> bool:
    return all(name == str(label) for label, name in enumerate(identities))


def _are_numbers(identities: Sequence[str]) -> bool:
    """Rising numbers, as of labels of which some are left out."""
    last = -1
    for name in identities:
        if not (name.isascii() and name.isdecimal() and len(name) < 19 and name == str(int(name)) and int(name) > last):
            return False
        last = int(name)
    return True
