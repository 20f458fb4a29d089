"""Made-up prompts of any length that need all of their text: nothing is downloaded.

In the manner of RULER (arXiv 2404.06654): something to find, to follow or to count among sentences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random

_NOUNS, _VERBS, _ADJECTIVES = map(
    str.split,
    (
        "bridge garden letter harbour engine winter teacher market forest river window painter doctor "
        "village museum station kitchen soldier journey island library machine mountain neighbour "
        "orchard paper question railway season theatre valley weather",
        "crossed described found followed forgot kept left noticed passed reached saw visited",
        "bright cold empty famous green heavy narrow old patient quiet sudden white",
    ),
)
_PLACES = (
    "before the evening",
    "after a long talk",
    "near the old town",
    "without a word",
    "in the second year",
    "as everyone expected",
    "because of the rain",
    "for the first time",
)


@dataclass(frozen=True)
class Task:
    """A prompt whose middle can be as long as one likes.

    Args:
        opening: what the prompt begins with. question: what it ends with.
        lines: its middle, line by line, without end.
    """

    opening: str
    question: str
    lines: Iterator[str]


def make_task(kind: int, seed: str) -> Task:
    """A task of the kind with that number; numbers go round. The same for the same seed."""
    return _KINDS[kind % len(_KINDS)](Random(seed))


def _sentence(random: Random) -> str:
    first, second = random.sample(_NOUNS, 2)
    return (
        f"The {random.choice(_ADJECTIVES)} {first} {random.choice(_VERBS)} the "
        f"{random.choice(_ADJECTIVES)} {second} {random.choice(_PLACES)}."
    )


def _among_sentences(random: Random, facts: list[str]) -> Iterator[str]:
    """Sentences, with a fact after every few: each in turn, again and again."""
    while True:
        for fact in facts:
            for _ in range(random.randint(4, 12)):
                yield _sentence(random)
            yield fact


def _needles(random: Random) -> Task:
    keys = random.sample(_NOUNS, 8)
    facts = [f"The number of the {key} is {random.randint(10**5, 10**6 - 1)}." for key in keys]
    return Task(
        "Some numbers are hidden in this text. Remember them.",
        f"What is the number of the {random.choice(keys)}? It is",
        _among_sentences(random, facts),
    )


def _variables(random: Random) -> Task:
    names = [f"{noun}_{random.randint(10, 99)}" for noun in random.sample(_NOUNS, 6)]
    value = random.randint(10**4, 10**5 - 1)
    sources = [str(value), *names]
    facts = [f"Set {name} to {source}." for name, source in zip(names, sources, strict=False)]
    return Task(
        "Variables are set in this text, some to others.",
        f"All variables that are {value}, in the order in which they are set:",
        _among_sentences(random, facts),
    )


def _words(random: Random) -> Task:
    common = random.sample(_NOUNS, 3)

    def lines() -> Iterator[str]:
        while True:
            words = random.choices(_NOUNS, k=9) + random.choices(common, k=6)
            random.shuffle(words)
            yield " ".join(words)

    return Task("This is a list of words.", "The three most common words are:", lines())


_KINDS: tuple[Callable[[Random], Task], ...] = (_needles, _variables, _words)
