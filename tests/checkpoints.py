"""What is in a checkpoint, independently of softgrpo.run.checkpoint."""

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save


def tensors_of(path):
    """Every tensor of a checkpoint, whole, by its name there."""
    whole = path.parent / f"{path.name}.pt"
    dcp_to_torch_save(path, whole)
    tensors = torch.load(whole)
    whole.unlink()
    assert set(tensors) == set(FileSystemReader(path).read_metadata().state_dict_metadata)
    return tensors


def weights_of(path):
    """The weights of a checkpoint by their names in the model."""
    return {n.removeprefix("model/"): t for n, t in tensors_of(path).items() if "model/" in n}
