"""The peaks of a model of any depth from walks of two shallow ones."""

from __future__ import annotations

from transformers import PretrainedConfig

from softgrpo.config import Config
from softgrpo.tools.plan.device import FakeGPU, Place
from softgrpo.tools.plan.walk import walk

SHALLOW = (4, 5)  # layer_name tells two layers at each end: from 4 on these are four


def peaks_and_flops(
    config: Config, model: PretrainedConfig, gpus: int
) -> tuple[dict[str, int], dict[str, float]]:
    """By phase: the most bytes that one of so many GPUs holds, and the operations of its matrix
    products in the part of a step that is walked (`walk.Share`).

    A layer adds to what is in use at a place always the same: weights, gradients, what it keeps for
    the backward pass. So each place grows linearly with the depth, those of the layers between the
    ends lie between theirs, and the peak of a phase is that of its highest place.
    """
    depth = model.num_hidden_layers
    shallow = [n for n in SHALLOW if n < depth] if depth > SHALLOW[-1] else [depth]
    walks = []
    for layers in shallow:
        gpu = FakeGPU()
        walk(gpu, config, model, layers, gpus)
        walks.append(gpu)
    places = {place for place in walks[0].peaks if place[0]}

    def at_depth(values: list[float]) -> float:
        if len(values) == 1:
            return values[0]
        (first, second), (low, high) = values, shallow
        return first + (second - first) / (high - low) * (depth - low)

    peaks: dict[str, int] = {}
    for phase, part in places:
        place: Place = (phase, part)
        peak = round(at_depth([gpu.peaks[place] for gpu in walks]))
        peaks[phase] = max(peak, peaks.get(phase, 0))
    flops = {phase: at_depth([gpu.flops[phase] for gpu in walks]) for phase in walks[0].flops}
    return peaks, flops
