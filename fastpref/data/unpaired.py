"""Mismatched completions: beside an example's own, one that answers another prompt."""

from collections.abc import Sequence
from dataclasses import replace

from fastpref.data.files import DataError
from fastpref.data.formats import Example


def _differs(a: Example, b: Example) -> bool:
    return a.completions[0] != b.completions[0]


def _is_needed(old: Example, kept: Sequence[Example]) -> bool:
    """Whether some example could be served by `old` and by none of the later ones kept.

    That is: a prompt other than old's (any of those kept, or one of which none is kept) such that
    whatever is kept under other prompts has one completion, and not old's.
    """
    for prompt in (None, *(e.prompt for e in kept)):
        if prompt != old.prompt:
            others = [e for e in kept if e.prompt != prompt]
            if all(_differs(e, old) and not _differs(e, others[0]) for e in others):
                return True
    return False


def _with(example: Example, kept: Sequence[Example]) -> list[Example]:
    """Latest first, the examples of which the next mismatch is one: never more than four."""
    out = [example]
    for old in kept:
        if _is_needed(old, out):
            out.append(old)
    return out


def add_mismatched(examples: list[Example]) -> list[Example]:
    """Each example with a second completion, that of the nearest earlier example that fits.

    One fits that has another prompt (else it may be a true answer), another completion and the same
    form (string or messages); where none does, another completion is enough. The first example
    looks to the end. Takes time linear in the examples, whatever repeats among them.

    Args:
        examples: of one completion each.

    Returns:
        The examples in order, with completions (own, mismatched).

    Raises:
        DataError: an example from whose completion no other of its form differs.
        ValueError: an example of several completions.

    Source: KTO estimates its KL term from such pairs (arXiv:2402.01306, section 4).
    """
    latest: dict[bool, list[Example]] = {True: [], False: []}  # by whether they are strings
    for e in examples:
        if len(e.completions) != 1:
            got = len(e.completions)
            raise ValueError(f"{e.source}: need examples of one completion, got one of {got}")
        form = isinstance(e.prompt, str)
        latest[form] = _with(e, latest[form])
    out = []
    for e in examples:
        form = isinstance(e.prompt, str)
        kept = latest[form]
        differing = [other for other in kept if _differs(other, e)]
        if not differing:
            need = "need completions that differ, to mismatch them with prompts"
            raise DataError(f"{e.source}: {need}, got one alone or the same everywhere")
        fits = next((other for other in differing if other.prompt != e.prompt), differing[0])
        out.append(replace(e, completions=(e.completions[0], fits.completions[0])))
        latest[form] = _with(e, kept)
    return out
