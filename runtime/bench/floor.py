"""How long what a card counts takes at least at measured rates: each step, a generation, many.

A floor of one generation alone is of its own steps. Where generations share steps, their weights
are read once for all of them, and what remains is by row: floors of any number of rows, and of a
generation among many, are of that.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from .card import Card
from .rates import Rates


@dataclass(frozen=True)
class FloorOfRows:
    """Of the steps of T rows: how many there are, seconds of one (their mean), as in Floor."""

    rows: int
    steps: int
    seconds: float
    blas_seconds: float | None


@dataclass(frozen=True)
class FloorOfAny:
    """Seconds of any step: of the weights, once; of a row's part of caches and conditions; of a
    row's products, 0 where their rate is not known. Of a card's rows the cheapest.
    """

    weights_seconds: float
    row_bytes_seconds: float
    row_products_seconds: float

    def seconds(self, rows: int) -> float:
        """That a step of so many rows takes at least, whosever they are."""
        moved = self.weights_seconds + rows * self.row_bytes_seconds
        return max(moved, rows * self.row_products_seconds)


@dataclass(frozen=True)
class Floor:
    """seconds: that all steps take at least; bytes_seconds, products_seconds: what they would take
    if only bytes moved, or only products were computed. blas_seconds: likewise at the rate that
    products of T rows have, not at the fastest of any; it is no floor, for other kernels may be
    better at few rows. None for what needs the rate of products where that is not known.
    first_frame_seconds: of the steps until the first frame that was not given; weights_seconds: of
    bytes_seconds what all reading of weights takes.
    """

    seconds: float
    bytes_seconds: float
    products_seconds: float | None
    blas_seconds: float | None
    first_frame_seconds: float
    weights_seconds: float
    by_rows: tuple[FloorOfRows, ...]
    of_any: FloorOfAny

    def together(self, generations: float) -> float:
        """Seconds of one of so many generations that share every step, and so the reading of
        weights; however their steps of different sizes meet, it cannot be less.
        """
        moved = self.bytes_seconds - self.weights_seconds + self.weights_seconds / generations
        return max(moved, self.products_seconds or 0.0)

    def to_json(self) -> dict[str, Any]:
        """JSON-able, beside a card's."""
        return {
            "floor_seconds": self.seconds,
            "floor_bytes_seconds": self.bytes_seconds,
            "floor_products_seconds": self.products_seconds,
            "blas_seconds": self.blas_seconds,
            "floor_first_frame_seconds": self.first_frame_seconds,
            "floor_by_rows": [dataclasses.asdict(each) for each in self.by_rows],
            "floor_of_any_rows": dataclasses.asdict(self.of_any),
        }


def of_any_rows(told: dict[str, Any] | None) -> FloorOfAny | None:
    """What a card's JSON says of it."""
    return None if not told else FloorOfAny(**told)


def floor(card: Card, rates: Rates) -> Floor:
    """What the steps of a card take at least at these rates: each its bytes or its products,
    whichever take longer. Products count only if the rates are of the precision of the card's.
    """
    known = card.products_precision == rates.precision and bool(rates.products)
    speed = rates.bytes_per_second
    moved = [step.bytes / speed for step in card.steps]
    computed, by_blas = [0.0] * len(moved), list(moved)
    if known:
        computed = [step.flops / rates.most_flops_per_second for step in card.steps]
        by_blas = [
            max(bytes_seconds, step.flops / rates.flops_per_second(step.rows))
            for bytes_seconds, step in zip(moved, card.steps, strict=True)
        ]
    least = [max(pair) for pair in zip(moved, computed, strict=True)]
    weights = [card.weights_bytes - (0 if step.drawn else card.head_bytes) for step in card.steps]
    beside = [
        max(0.0, step.bytes - read) / step.rows
        for step, read in zip(card.steps, weights, strict=True)
    ]
    of_rows: dict[int, list[int]] = defaultdict(list)
    for index, step in enumerate(card.steps):
        of_rows[step.rows].append(index)
    return Floor(
        seconds=sum(least),
        bytes_seconds=sum(moved),
        products_seconds=sum(computed) if known else None,
        blas_seconds=sum(by_blas) if known else None,
        first_frame_seconds=sum(least[: card.first_frame_steps]),
        weights_seconds=sum(weights) / speed,
        by_rows=tuple(
            FloorOfRows(
                rows=rows,
                steps=len(steps),
                seconds=sum(least[step] for step in steps) / len(steps),
                blas_seconds=sum(by_blas[step] for step in steps) / len(steps) if known else None,
            )
            for rows, steps in sorted(of_rows.items())
        ),
        of_any=FloorOfAny(
            weights_seconds=min(weights) / speed,
            row_bytes_seconds=min(beside) / speed,
            row_products_seconds=min(
                seconds / step.rows for seconds, step in zip(computed, card.steps, strict=True)
            ),
        ),
    )
