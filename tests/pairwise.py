"""Few cases in which every two levels of any two factors meet, by greedy search from a seed."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any

Factors = Mapping[str, Sequence[Any]]
Row = dict[str, Any]
Pair = tuple[str, int, str, int]


@dataclass(frozen=True)
class Rule:
    """What a row must obey: `holds` of the levels of `names`."""

    names: tuple[str, ...]
    holds: Callable[..., bool]


class Search:
    """The pairs that no row has yet, and how to find a row that has many of them."""

    def __init__(self, factors: Factors, rules: Sequence[Rule], seed: int):
        self.levels = {name: list(levels) for name, levels in factors.items()}
        self.rank = {name: i for i, name in enumerate(self.levels)}
        self.rules = {name: [rule for rule in rules if name in rule.names] for name in self.levels}
        self.random = random.Random(seed)
        self.missing: set[Pair] = set()

    def pairs(self, names: Sequence[str]) -> list[Pair]:
        """Every pair of levels of these factors that no rule forbids by itself."""
        return [
            (a, i, b, j)
            for a, b in combinations(names, 2)
            for i, j in product(range(len(self.levels[a])), range(len(self.levels[b])))
            if self.obeys({a: i, b: j}, a) and self.obeys({a: i, b: j}, b)
        ]

    def obeys(self, row: dict[str, int], name: str) -> bool:
        """Whether every rule on `name` whose other factors are chosen too holds."""
        return all(
            rule.holds(*(self.levels[other][row[other]] for other in rule.names))
            for rule in self.rules[name]
            if all(other in row for other in rule.names)
        )

    def gain(self, row: dict[str, int], name: str, level: int) -> int:
        """How many missing pairs `name` at this level makes with the rest of the row."""
        return sum(
            self._pair(name, level, other, chosen) in self.missing
            for other, chosen in row.items()
            if other != name
        )

    def complete(self, start: dict[str, int], tries: int = 6) -> dict[str, int] | None:
        """`start` with a level for each factor it lacks; the best of several tries, None if all fail."""
        best, most = None, -1
        for attempt in range(tries * 4):
            row, total = dict(start), 0
            free = [name for name in self.levels if name not in row]
            self.random.shuffle(free)
            for name in free:
                allowed = [
                    (self.gain(row, name, level), self.random.random(), level)
                    for level in range(len(self.levels[name]))
                    if self.obeys(row | {name: level}, name)
                ]
                if not allowed:
                    break
                gain, _, level = max(allowed)
                row[name] = level
                total += gain
            else:
                if total > most:
                    best, most = row, total
            if best is not None and attempt >= tries:
                break
        return best

    def take(self, row: dict[str, int]) -> Row:
        """Strikes the row's pairs off, and names its levels."""
        for a, b in combinations(self.levels, 2):
            self.missing.discard((a, row[a], b, row[b]))
        return {name: self.levels[name][row[name]] for name in self.levels}

    def next_pair(self) -> dict[str, int]:
        a, i, b, j = min(self.missing)
        return {a: i, b: j}

    def _pair(self, a: str, i: int, b: str, j: int) -> Pair:
        return (a, i, b, j) if self.rank[a] < self.rank[b] else (b, j, a, i)


def grouped_rows(
    outer: Factors,
    inner: Factors,
    rules: Sequence[Rule] = (),
    *,
    per_group: int = 1,
    total: int = 0,
    seed: int = 0,
) -> list[list[Row]]:
    """Rows that cover every allowed pair of levels, in groups with the same levels of `outer`.

    Args:
        outer: factors that are dear to change, such as those that a compiler sees.
        inner: factors that are cheap to change.
        rules: rows that break one don't occur.
        per_group: rows of a group, at least.
        total: rows altogether, at least; what pairs don't need is filled at random.
    Raises:
        ValueError: a pair that no rule forbids can't be completed to a row.
    """
    search = Search({**outer, **inner}, rules, seed)
    search.missing = set(search.pairs(list(outer)))
    starts: list[dict[str, int]] = []
    rows: list[list[Row]] = []

    def found(start: dict[str, int]) -> dict[str, int]:
        row = search.complete(start)
        if row is None:
            raise ValueError(f"no row has {start}")
        return row

    def new_group(row: dict[str, int]) -> None:
        starts.append({name: row[name] for name in outer})
        rows.append([search.take(row)])

    while search.missing:
        new_group(found(search.next_pair()))
    search.missing = set(search.pairs(list(search.levels)))
    for row in (row for group in rows for row in group):
        search.take({name: search.levels[name].index(row[name]) for name in search.levels})
    for group, start in zip(rows, starts, strict=True):
        while len(group) < per_group:
            group.append(search.take(found(start)))
    while search.missing:
        pair = search.next_pair()
        fitting = [g for g, start in enumerate(starts) if _agree(start, pair)]
        for g in sorted(fitting, key=lambda g: len(rows[g])):
            row = search.complete(starts[g] | pair)
            if row is not None:
                rows[g].append(search.take(row))
                break
        else:
            new_group(found(pair))
    while sum(map(len, rows)) < total:
        g = min(range(len(rows)), key=lambda g: len(rows[g]))
        rows[g].append(search.take(found(starts[g])))
    return rows


def uncovered(rows: Sequence[Row], factors: Factors, rules: Sequence[Rule] = ()) -> list[Pair]:
    """The allowed pairs, as positions of levels, that no row has."""
    search = Search(factors, rules, 0)
    search.missing = set(search.pairs(list(factors)))
    for row in rows:
        search.take({name: search.levels[name].index(row[name]) for name in search.levels})
    return sorted(search.missing)


def _agree(start: dict[str, int], pair: dict[str, int]) -> bool:
    return all(start.get(name, level) == level for name, level in pair.items())
