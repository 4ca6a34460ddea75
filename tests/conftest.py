"""Before anything imports Triton: without a GPU its kernels run under the interpreter.

Triton reads the variable when a kernel is defined, its own library of kernels included.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
