"""The same parameter server in plain PyTorch: `python -m` this, with a JSON task, see jax_worker.

It is run by an interpreter that has PyTorch and need not have the library: it imports nothing but
the standard library, numpy, torch and `workers`, which needs no more.
"""

import importlib
import importlib.util
import itertools
import json
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.workers import serve_epochs

# Tools that read every module of the package, such as doctest, need not have PyTorch.
_HAS_TORCH = importlib.util.find_spec("torch") is not None
torch: Any = importlib.import_module("torch") if _HAS_TORCH else None
functional: Any = importlib.import_module("torch.nn.functional") if _HAS_TORCH else None

Tensor = Any


def init_dense(fan_in: int, fan_out: int) -> list[Tensor]:
    """A dense layer's weight, of variance 1 / fan in as in the JAX models, and zero bias."""
    return [torch.randn(fan_out, fan_in) / fan_in**0.5, torch.zeros(fan_out)]


def init_conv(channels_in: int, channels_out: int, side: int) -> list[Tensor]:
    """A convolution's weight and bias."""
    fan_in = channels_in * side * side
    return [
        torch.randn(channels_out, channels_in, side, side) / fan_in**0.5,
        torch.zeros(channels_out),
    ]


def make_lenet(image_shape: tuple[int, ...], options: dict[str, Any]) -> Any:
    """Fig. 1's LeNet on 28x28 images: parameters, and logits as a function of them and a batch."""
    del image_shape, options
    params = [*init_conv(1, 20, 5), *init_conv(20, 50, 5), *init_dense(800, 500)]
    params += init_dense(500, 10)

    def logits(p: list[Tensor], x: Tensor) -> Tensor:
        x = functional.relu(functional.max_pool2d(functional.conv2d(x, p[0], p[1]), 2))
        x = functional.relu(functional.max_pool2d(functional.conv2d(x, p[2], p[3]), 2))
        x = functional.relu(functional.linear(x.flatten(1), p[4], p[5]))
        return functional.linear(x, p[6], p[7])

    return params, logits


def make_mlp(image_shape: tuple[int, ...], options: dict[str, Any]) -> Any:
    """Dense layers with tanh between them."""
    sizes = [int(np.prod(image_shape)), *options["hidden"], 10]
    params = [tensor for pair in itertools.pairwise(sizes) for tensor in init_dense(*pair)]

    def logits(p: list[Tensor], x: Tensor) -> Tensor:
        x = x.flatten(1)
        for i in range(0, len(p) - 2, 2):
            x = torch.tanh(functional.linear(x, p[i], p[i + 1]))
        return functional.linear(x, p[-2], p[-1])

    return params, logits


_MODELS = {"mnist_cnn": make_lenet, "mlp": make_mlp}


def make_eager_epochs(task: dict[str, Any]) -> Callable[[int], float]:
    """Returns `run(n)`: n epochs of N round-robin workers, each with its own parameter copy.

    A worker's gradient is taken at its copy, the server makes the step, and the worker pulls.
    """
    with np.load(task["arrays"]) as arrays:
        images = torch.from_numpy(arrays["images"]).permute(0, 3, 1, 2).contiguous()
        labels = torch.from_numpy(arrays["labels"]).long()
    shape = tuple(images.shape[1:])
    server, logits = _MODELS[task["model"]](shape, task["model_options"])
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


if __name__ == "__main__":
    torch.manual_seed(0)
    serve_epochs(
        make_eager_epochs(json.loads(sys.argv[1])),
        prepare=lambda request: torch.set_num_threads(request["threads"]),
    )
