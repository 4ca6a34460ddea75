"""How much memory a piece of code takes."""

import itertools

import torch


def peak_memory(run):
    """The most bytes that PyTorch's CPU allocator held at a time during `run()`, above those at its
    start; what operators allocate inside counts too."""
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        run()
    events = [e for e in profile.kineto_results.events() if e.name() == "[memory]"]
    held = itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
    return max(held, default=0)
