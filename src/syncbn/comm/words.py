"""Ranks in words, however many there are."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping


def ranges(numbers: Iterable[int]) -> str:
    """0, 1, 2, 5 as "0–2, 5"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    dash = {0: "", 1: ", "}
    return ", ".join(
        f"{begin}{dash.get(end - begin, '–')}{end if end > begin else ''}" for begin, end in runs
    )


def ranks(numbers: Collection[int]) -> str:
    """The same with its noun."""
    return f"rank{'s' if len(numbers) > 1 else ''} {ranges(numbers)}"


def told(texts: Mapping[int, str]) -> str:
    """What each rank says; those that say the same together."""
    who: dict[str, list[int]] = {}
    for rank, text in texts.items():
        who.setdefault(text, []).append(rank)
    return "; ".join(f"{ranks(numbers)}: {text}" for text, numbers in who.items())
