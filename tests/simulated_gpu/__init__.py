"""A simulated CUDA device: the program for real, on the CPU, failing where a GPU would.

Tensors on it are real CUDA tensors for all that ask: PyTorch has hooks for devices (a device guard,
allocators, CUDA's hooks, a boxed kernel for all operators), and csrc/ fills them in a CPU build.
Every operator runs PyTorch's CPU kernel in the same memory, behind the checks of a CUDA build:

- tensors of two devices are refused in PyTorch's words, with PyTorch's exceptions;
- each wait of the host is noted with the line of the program that caused it (`waits`);
- what is copied to pinned memory is not there before the host has waited, and pinned memory must
  not be written while a copy from it is under way;
- a graph logs what is captured and leaves memory as it was; a replay runs the log in the same
  memory; what may not be captured raises; what was made while capturing holds garbage until then;
- Triton kernels run in its interpreter, or by stand-ins that write the same (`stand_ins`).

What it cannot see: races between streams, what a compiled kernel does not take (ahead-of-time
compilation looks at that), the size of real memory, speed, and the roundings of real kernels.

It needs a build of PyTorch without CUDA. `load` must come before ``import torch``: PyTorch asks for
the hooks once, while it is imported.
"""
