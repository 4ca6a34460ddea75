"""Calls that make the host wait, of a tensor x = [0, 1, 2, 3] on the device."""

import pickle

import torch

WAITS = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool((x > 1).any()),
    "float": lambda x: float(x[0]),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "from a list": lambda x: torch.tensor([1.0], device="cuda"),
    "from the host": lambda x: torch.ones(4).to("cuda"),
    "from pageable memory": lambda x: torch.ones(4).to("cuda", non_blocking=True),
    "nonzero": lambda x: x.nonzero(),
    "x[mask]": lambda x: x[x > 1],
    "x[mask] = tensor": lambda x: x.__setitem__(x > 1, torch.ones_like(x)[:2]),
    "x[rows] = number": lambda x: x.__setitem__(x.long(), 0.0),
    "x[0] = number": lambda x: x.__setitem__(0, 1.0),
    "x[cpu rows]": lambda x: x[torch.tensor([1])],
    "masked_select": lambda x: x.masked_select(x > 1),
    "unique": lambda x: x.unique(),
    "equal": lambda x: torch.equal(x, x),
    "repeat_interleave": lambda x: torch.repeat_interleave(x, x.long()),
    "synchronize": lambda x: torch.cuda.synchronize(),
    "stream": lambda x: torch.cuda.current_stream().synchronize(),
    "event": lambda x: torch.cuda.current_stream().record_event().synchronize(),
    "pickle": lambda x: pickle.dumps(x),
}
