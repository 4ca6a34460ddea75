"""Layered graphs: which of two nodes can be reached from the root?

A graph has HOPS + 1 layers of WIDTH nodes; every node has DEGREE edges into the next layer, and the
names of the nodes are shuffled for every graph. The question lists the edges in a random order, a
token for each, then two nodes of the last layer, one of which can be reached, and the root: the
first hop is as all others are.

One hop takes one forward pass, which can follow the edges of all nodes that its input names. Who is
fed the whole frontier (a mixture of its names) keeps it; who is fed one node has dropped the rest.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

HOPS, WIDTH, DEGREE = 3, 6, 2
NAMES = [f"n{i}" for i in range((HOPS + 1) * WIDTH)]
ASK, THINK, FILL, END = "<ask>", "<think>", "<fill>", "<end>"
EDGES = [f"{source}>{target}" for source in NAMES for target in NAMES if source != target]
VOCABULARY = [*NAMES, *EDGES, ASK, THINK, FILL, END]
# Of all frontiers together, at most.
LISTED = sum(min(WIDTH, DEGREE**hop) for hop in range(1, HOPS + 1))


@dataclass(frozen=True)
class Graph:
    """edges: shuffled, tokens. root, answer, other: names; asked: the last two in random order.
    frontiers: the names that can be reached in 1, 2, .. steps. path: names of one way from the root
    (left out) to the answer."""

    edges: list[str]
    root: str
    answer: str
    other: str
    asked: tuple[str, str]
    frontiers: list[list[str]]
    path: list[str]

    @property
    def prompt(self) -> str:
        return " ".join([*self.edges, ASK, *self.asked, THINK, self.root])

    @property
    def listing(self) -> list[str]:
        """The frontiers one node after the other, filled up to the most there can be."""
        nodes = [name for frontier in self.frontiers for name in sorted(frontier, key=_number)]
        return nodes + [FILL] * (LISTED - len(nodes))


def _number(name: str) -> int:
    return int(name[1:])


def draw_graph(rng: np.random.Generator, hops: int = HOPS) -> Graph:
    """A graph whose last layer is neither wholly reached nor reached in one node only."""
    numbers = (hops + 1) * WIDTH
    while True:
        names = np.array([f"n{i}" for i in rng.permutation(numbers)]).reshape(hops + 1, WIDTH)
        targets = np.stack(
            [
                np.stack([rng.choice(WIDTH, DEGREE, replace=False) for _ in range(WIDTH)])
                for _ in range(hops)
            ]
        )
        root = int(rng.integers(WIDTH))
        reached = [{root}]
        for hop in range(hops):
            reached.append({int(t) for node in reached[-1] for t in targets[hop, node]})
        if len(reached[-1]) < WIDTH:
            break
    inside = int(rng.choice(sorted(reached[-1])))
    outside = int(rng.choice(sorted(set(range(WIDTH)) - reached[-1])))
    edges = [
        f"{names[hop, node]}>{names[hop + 1, target]}"
        for hop in range(hops)
        for node in range(WIDTH)
        for target in targets[hop, node]
    ]
    order = rng.permutation(len(edges))
    answer, other = str(names[hops, inside]), str(names[hops, outside])
    asked = (answer, other) if rng.random() < 0.5 else (other, answer)
    return Graph(
        edges=[edges[i] for i in order],
        root=str(names[0, root]),
        answer=answer,
        other=other,
        asked=asked,
        frontiers=[
            [str(names[hop, node]) for node in sorted(reached[hop])] for hop in range(1, hops + 1)
        ],
        path=[str(names[hop, n]) for hop, n in enumerate(_path(targets, root, inside, rng), 1)],
    )


def _path(targets: np.ndarray, root: int, goal: int, rng: np.random.Generator) -> list[int]:
    """The nodes of a way from the root (left out) to the goal, drawn among all ways."""
    ways = [[root]]
    for hop in range(len(targets)):
        ways = [[*way, int(t)] for way in ways for t in targets[hop, way[-1]]]
    ways = [way for way in ways if way[-1] == goal]
    return ways[int(rng.integers(len(ways)))][1:]
