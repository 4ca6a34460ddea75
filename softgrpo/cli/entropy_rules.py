"""Arguments of the commands for thinking that goes by its entropy (see SoftParams)."""

from __future__ import annotations

import argparse

ENTROPY_RULES = ("cold_stop_entropy", "cold_stop_steps", "switch_window", "max_switches")


def add_entropy_rules(parser: argparse.ArgumentParser) -> None:
    """Adds a flag for each of ENTROPY_RULES; None where it is not given."""
    add = parser.add_argument_group("by the entropy of the next token, in nats").add_argument
    add("--cold-stop-entropy", type=float, metavar="H",
        help="Soft Thinking: stop thinking after --cold-stop-steps (256) soft positions below H, "
        "such as 0.01")  # fmt: skip
    add("--cold-stop-steps", type=int, metavar="N", help="how many in a row")
    add("--switch-window", type=int, metavar="N",
        help="SwiReasoning: soft until the entropy falls, then discrete for at least N positions "
        "(512) and until it rises")  # fmt: skip
    add("--max-switches", type=int, metavar="N", help="then thinking ends")
