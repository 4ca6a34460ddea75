"""softgrpo-train with an engine that may take several GPUs; here it takes the CPU's."""

import json
import os
from importlib.metadata import EntryPoint
from pathlib import Path

from softgrpo.config import engines
from softgrpo_engine import LLM


class WideLLM(LLM):
    """Writes down for how many GPUs it was made, and by which process."""

    def __init__(self, model, *, tensor_parallel=1, **options):
        made = {"rank": os.environ["RANK"], "gpus": tensor_parallel}
        with Path(os.environ["MADE"]).open("a") as file:
            file.write(json.dumps(made) + "\n")
        super().__init__(model, **options)


def main(arguments):
    from softgrpo.cli.train import main as train

    point = EntryPoint("wide", "one_engine_of_two:WideLLM", engines.GROUP)
    engines._OWN = (*engines._OWN, point)
    return train(arguments)
