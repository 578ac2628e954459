"""The models of the comparison in plain PyTorch: a list of parameters, and logits as a function.

Like torch_worker.py it needs no more than torch and the standard library.
"""

import importlib
import importlib.util
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

# Tools that read every module of the package, such as doctest, need not have PyTorch.
_HAS_TORCH = importlib.util.find_spec("torch") is not None
torch: Any = importlib.import_module("torch") if _HAS_TORCH else None
functional: Any = importlib.import_module("torch.nn.functional") if _HAS_TORCH else None

Tensor = Any
Layer = Callable[[Callable[[], Tensor], Tensor], Tensor]
_DECAY = 0.9  # of BatchNorm's running statistics
_VGG = ((64, 1), (128, 1), (256, 0), (256, 1), (512, 0), (512, 1), (512, 0), (512, 1))


class Model(NamedTuple):
    """Parameters, and `logits(parameters, images)` with NCHW images."""

    params: list[Tensor]
    logits: Callable[[list[Tensor], Tensor], Tensor]


class Builder:
    """Collects the parameters of layers in the order in which their functions will ask for them."""

    def __init__(self) -> None:
        self.params: list[Tensor] = []

    def conv(
        self, channels_in: int, channels_out: int, side: int, *, stride: int = 1, pad: int = 0,
        bias: bool = True,
    ) -> Layer:  # fmt: skip
        """A convolution; its weight has variance 1 / fan in."""
        fan_in = channels_in * side * side
        weight = torch.randn(channels_out, channels_in, side, side) / math.sqrt(fan_in)
        self.params += [weight, torch.zeros(channels_out)] if bias else [weight]

        def apply(take: Callable[[], Tensor], x: Tensor) -> Tensor:
            return functional.conv2d(x, take(), take() if bias else None, stride, pad)

        return apply

    def norm(self, channels: int) -> Layer:
        """BatchNorm in training mode, with running statistics of its own."""
        self.params += [torch.ones(channels), torch.zeros(channels)]
        mean, variance = torch.zeros(channels), torch.ones(channels)

        def apply(take: Callable[[], Tensor], x: Tensor) -> Tensor:
            scale, shift = take(), take()
            return functional.batch_norm(x, mean, variance, scale, shift, True, 1 - _DECAY)

        return apply

    def dense(self, fan_in: int, fan_out: int) -> Layer:
        """A dense layer; its weight has variance 1 / fan in."""
        self.params += [torch.randn(fan_out, fan_in) / math.sqrt(fan_in), torch.zeros(fan_out)]

        def apply(take: Callable[[], Tensor], x: Tensor) -> Tensor:
            return functional.linear(x, take(), take())

        return apply

    def model(self, layers: list[Layer]) -> Model:
        """The layers one after the other."""
        chain = _in_order(layers)

        def logits(params: list[Tensor], x: Tensor) -> Tensor:
            return chain(iter(params).__next__, x)

        return Model(self.params, logits)


def _in_order(layers: list[Layer]) -> Layer:
    def apply(take: Callable[[], Tensor], x: Tensor) -> Tensor:
        for layer in layers:
            x = layer(take, x)
        return x

    return apply


def _plain(function: Callable[[Tensor], Tensor]) -> Layer:
    return lambda take, x: function(x)


def _relu(x: Tensor) -> Tensor:
    return functional.relu(x)


def _pool(x: Tensor) -> Tensor:
    return functional.max_pool2d(x, 2)


def _flatten(x: Tensor) -> Tensor:
    return x.flatten(1)


def _mean(x: Tensor) -> Tensor:
    return x.mean((2, 3))


def make_mlp(image_shape: tuple[int, ...], options: dict[str, Any]) -> Model:
    """Dense layers with tanh between them."""
    build = Builder()
    sizes = [math.prod(image_shape), *options["hidden"], 10]
    layers = [_plain(_flatten)]
    for fan_in, fan_out in itertools.pairwise(sizes):
        layers += [build.dense(fan_in, fan_out), _plain(torch.tanh)]
    return build.model(layers[:-1])


def make_lenet(image_shape: tuple[int, ...], options: dict[str, Any]) -> Model:
    """Fig. 1's LeNet on 28x28 images."""
    del image_shape, options
    build = Builder()
    pooled = [_plain(_pool), _plain(_relu)]
    layers = [build.conv(1, 20, 5), *pooled, build.conv(20, 50, 5), *pooled, _plain(_flatten)]
    layers += [build.dense(800, 500), _plain(_relu), build.dense(500, 10)]
    return build.model(layers)


def make_batch_norm_cnn(image_shape: tuple[int, ...], options: dict[str, Any]) -> Model:
    """Four 3x3 convolutions with BatchNorm, pooled twice."""
    del options
    build, channels_in, layers = Builder(), image_shape[0], list[Layer]()
    for index, channels in enumerate((32, 64, 64, 128)):
        layers += [build.conv(channels_in, channels, 3, pad=1, bias=False), build.norm(channels)]
        layers += [_plain(_pool)] if index % 2 else []
        layers += [_plain(_relu)]
        channels_in = channels
    return build.model([*layers, _plain(_mean), build.dense(channels_in, 10)])


def make_vgg11(image_shape: tuple[int, ...], options: dict[str, Any]) -> Model:
    """VGG-11 without BatchNorm, of a width."""
    build, channels_in, layers = Builder(), image_shape[0], list[Layer]()
    for full, pooled in _VGG:
        channels = max(4, round(full * options["width"]))
        layers += [build.conv(channels_in, channels, 3, pad=1)]
        layers += [_plain(_pool)] if pooled else []
        layers += [_plain(_relu)]
        channels_in = channels
    return build.model([*layers, _plain(_mean), build.dense(channels_in, 10)])


def make_resnet20(image_shape: tuple[int, ...], options: dict[str, Any]) -> Model:
    """ResNet-20 with projection shortcuts."""
    del options
    build = Builder()
    layers = [build.conv(image_shape[0], 16, 3, pad=1, bias=False), build.norm(16), _plain(_relu)]
    channels_in = 16
    for stage, channels in enumerate((16, 32, 64)):
        for number in range(3):
            stride = 2 if stage and not number else 1
            layers.append(_residual_block(build, channels_in, channels, stride))
            channels_in = channels
    return build.model([*layers, _plain(_mean), build.dense(channels_in, 10)])


def _residual_block(build: Builder, channels_in: int, channels: int, stride: int) -> Layer:
    first = [build.conv(channels_in, channels, 3, stride=stride, pad=1, bias=False)]
    first += [build.norm(channels), _plain(_relu)]
    first += [build.conv(channels, channels, 3, pad=1, bias=False), build.norm(channels)]
    shortcut = list[Layer]()
    if channels != channels_in:
        shortcut += [build.conv(channels_in, channels, 1, stride=stride, bias=False)]
        shortcut += [build.norm(channels)]

    residual, identity = _in_order(first), _in_order(shortcut)

    def apply(take: Callable[[], Tensor], x: Tensor) -> Tensor:
        y = residual(take, x)  # whose parameters come first
        return functional.relu(identity(take, x) + y)

    return apply


TORCH_MODELS: dict[str, Callable[[tuple[int, ...], dict[str, Any]], Model]] = {
    "mlp": make_mlp,
    "mnist_cnn": make_lenet,
    "mnist_cnn_bn": make_batch_norm_cnn,
    "vgg11": make_vgg11,
    "resnet20": make_resnet20,
}
