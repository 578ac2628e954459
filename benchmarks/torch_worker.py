"""The same parameter server in plain PyTorch: `python -m` this, with a JSON task, see jax_worker.

It is run by an interpreter that has PyTorch and need not have the library: it imports nothing but
the standard library, numpy, torch and modules that need no more.
"""

import json
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.torch_models import TORCH_MODELS, Tensor, functional, torch
from benchmarks.workers import serve_epochs, use_cores


def make_eager_epochs(task: dict[str, Any]) -> Callable[[int], float]:
    """Returns `run(n)`: n epochs of N round-robin workers, each with its own parameter copy.

    A worker's gradient is taken at its copy, the server makes the step, and the worker pulls.
    """
    with np.load(task["arrays"]) as arrays:
        images = torch.from_numpy(arrays["images"]).permute(0, 3, 1, 2).contiguous()
        labels = torch.from_numpy(arrays["labels"]).long()
    server, logits = TORCH_MODELS[task["model"]](tuple(images.shape[1:]), task["model_options"])
    if task["channels_last"]:
        images = images.contiguous(memory_format=torch.channels_last)
        server = [_channels_last(tensor) for tensor in server]
    num_workers, size = task["num_workers"], task["batch_size"]
    copies = [[p.clone().requires_grad_() for p in server] for _ in range(num_workers)]
    steps_per_epoch = len(labels) // size
    number = 0

    def epoch() -> Tensor:
        nonlocal number
        order = torch.randperm(len(labels))
        total = torch.zeros(())
        for step in range(steps_per_epoch):
            samples = order[step * size : (step + 1) * size]
            x = (images[samples].float() / 255 - 0.5) / 0.5
            worker = copies[number % num_workers]
            loss = functional.cross_entropy(logits(worker, x), labels[samples])
            gradients = torch.autograd.grad(loss, worker)
            with torch.no_grad():
                torch._foreach_add_(server, gradients, alpha=-task["learning_rate"])
                torch._foreach_copy_(worker, server)
                total += loss
            number += 1
        return total / steps_per_epoch

    def run(num_epochs: int) -> float:
        return [epoch().item() for _ in range(num_epochs)][-1]

    return run


def _channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor


if __name__ == "__main__":
    request = json.loads(sys.argv[1])
    torch.set_num_threads(use_cores(request["cores"]))
    torch.manual_seed(0)
    serve_epochs(make_eager_epochs(request))
