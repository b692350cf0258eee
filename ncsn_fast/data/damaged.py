"""Images that cannot be read: one error for all of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ncsn_fast.data.decode import REMEDY, DataError

REMOVE = "Remove or replace them."
SKIP = "Remove or replace them, or leave them out with --skip-damaged."
NAMED = 3  # damaged images, at most, that a message names


def damaged_images(errors: Sequence[DataError], n: int, remedy: str) -> DataError:
    """Returns an error that counts the damaged of n images, and names the first.

    Args:
        errors: those of the single images.   remedy: last sentence of the message.
    """
    return DataError(f"{len(errors)} of {n} images cannot be read: {names(errors)}. {remedy}")


def names(errors: Iterable[DataError]) -> str:
    """Returns what the first of the errors say, without their remedies, and how many follow."""
    texts = [str(error).removesuffix(REMEDY).rstrip(". ") for error in errors]
    more = f"; and {len(texts) - NAMED} more" if len(texts) > NAMED else ""
    return "; ".join(texts[:NAMED]) + more
