"""What each process finds at the start of a run and in a pass:

    python ranks.py RANK SIZE FOLDER

FOLDER: models `tied` and `untied`, `batches.pt` of {name: (batch, settings)}; `found_RANK.pt` is
written.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # allocations

import torch
import torch.distributed as dist
from allocations import peak_memory
from torch.distributed.tensor import DTensor

from softgrpo.config import Config
from softgrpo.distributed import World
from softgrpo.learner.load import load_policies
from softgrpo.learner.lora import merged_tensors
from softgrpo.learner.sharding import full

CPU = torch.device("cpu")


def start(model, world, *overrides, device=CPU):
    """The policy, and the first one for the KL."""
    config = Config.load("demo", [f"model.path={model}", "algorithm.kl_coef=0.1", *overrides])
    return load_policies(config, Path(model), device, world)


def bytes_of(policy):
    """What a process holds of the parameters."""
    local = (p.to_local() if isinstance(p, DTensor) else p for p in policy.parameters())
    return sum(p.numel() * p.element_size() for p in local)


def tensors_of(policy):
    tensors = {name: full(tensor.detach()) for name, tensor in policy.decoder.named_parameters()}
    return tensors | dict(policy.decoder.named_buffers())


def of_pass(policy, batch, settings, samples):
    """The gradient so far, with this pass over some samples, and the pass's log-densities."""
    policy.settings = settings
    part, _ = batch.select_samples(samples)
    density = policy(part).density
    table = policy.decoder.embed_weight  # gathered until the backward pass
    (density * torch.linspace(-1.0, 1.0, len(density))).sum().backward()
    gradients = {
        name: full(parameter.grad) for name, parameter in policy.decoder.named_parameters()
    }
    return {"gradients": gradients, "density": density.detach(), "table": table.dtype}


@torch.no_grad()
def of_first(reference, batch, settings, samples):
    """Log-densities of the first model; whether it is sharded again after the pass."""
    reference.settings = settings
    density = reference(batch.select_samples(samples)[0]).density
    return density, all(isinstance(p, DTensor) for p in reference.parameters())


def of_start(model, world):
    found = {}

    def run():
        found["policies"] = start(model, world)

    peak = peak_memory(run)
    policies = found.pop("policies")
    return {
        "peak": peak,
        "held": sum(map(bytes_of, policies)),
        "tensors": [tensors_of(policy) for policy in policies],
        "sync": largest_sync(policies[0].decoder),
    }


def largest_sync(decoder):
    """The peak of taking every tensor of the weights, whole, in turn."""

    def run():
        for _, tensor in merged_tensors(decoder):
            del tensor

    return peak_memory(run)


def main(rank, size, folder):
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=size)
    world, found = World(rank, size), {}
    for model in ("tied", "untied"):
        found[model] = of_start(folder / model, world)
        found["replicated", model] = tensors_of(start(folder / model, World(rank, size, size))[0])
        for dtype in ("bfloat16", "float32"):
            policy, reference = start(folder / model, world, f"model.dtype={dtype}")
            for name, (batch, settings) in torch.load(
                folder / "batches.pt", weights_only=False
            ).items():
                policy.zero_grad(set_to_none=True)
                samples = world.share(range(len(batch.group)))
                found[model, dtype, name] = of_pass(policy, batch, settings, samples)
                found[model, dtype, name]["reference"] = of_first(
                    reference, batch, settings, samples
                )
    torch.save(found, folder / f"found_{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
