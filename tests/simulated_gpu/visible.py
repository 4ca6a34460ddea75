"""Whether the tests see the GPUs of this machine. Needs neither PyTorch nor Triton."""

import os


def hide_gpus() -> None:
    """Unless `make test-gpu` asks for them; before PyTorch is imported."""
    if os.environ.get("SOFTGRPO_TEST_GPU") != "1":
        # The tests of the CPU hold on a machine with a GPU where they do not see it.
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ["HIP_VISIBLE_DEVICES"] = "-1"
