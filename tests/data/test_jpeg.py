"""Crops and centre cuts against plain Python."""

import io
import math

import numpy as np
import pytest
from PIL import Image

from asgd_jax.data import jpeg
from asgd_jax.data.prepared import tensorflow_modules

ACCURATE = "INTEGER_ACCURATE"


def plain_crop_window(height: int, width: int, draws: np.ndarray) -> tuple[int, int, int, int]:
    """torchvision's RandomResizedCrop, with the uniform numbers given."""
    for attempt in range(10):
        area = height * width * (0.08 + 0.92 * draws[attempt])
        log_ratio = math.log(3 / 4) + (math.log(4 / 3) - math.log(3 / 4)) * draws[10 + attempt]
        ratio = math.exp(log_ratio)
        w, h = max(round(math.sqrt(area * ratio)), 1), max(round(math.sqrt(area / ratio)), 1)
        if w <= width and h <= height:
            return int(draws[20] * (height - h + 1)), int(draws[21] * (width - w + 1)), h, w
    w, h = width, height
    if width / height < 3 / 4:
        h = round(w / (3 / 4))
    elif width / height > 4 / 3:
        w = round(h * (4 / 3))
    return (height - h) // 2, (width - w) // 2, h, w


@pytest.fixture(scope="module")
def window():
    tf, _ = tensorflow_modules()
    compiled = tf.function(
        jpeg.crop_window,
        input_signature=[
            tf.TensorSpec([], tf.int32),
            tf.TensorSpec([], tf.int32),
            tf.TensorSpec([jpeg.NUM_DRAWS], tf.float32),
        ],
    )
    return lambda height, width, draws: compiled(height, width, draws).numpy()


def test_crop_window_is_torchvisions(window):
    rng = np.random.default_rng(0)
    sizes = [(375, 500), (500, 375), (160, 160), (37, 20), (30, 400), (400, 30), (1, 1), (3, 2)]
    differing = 0
    for _ in range(60):
        for height, width in sizes:
            draws = rng.random(jpeg.NUM_DRAWS, np.float32)
            top, left, h, w = got = window(height, width, draws)
            assert 0 <= top <= height - h
            assert 0 <= left <= width - w
            assert h >= 1
            assert w >= 1
            want = plain_crop_window(height, width, draws.astype(np.float64))
            # float32 against float64: a rounding may fall to the other side, rarely and by a pixel.
            assert np.abs(got - want).max() <= 1
            differing += tuple(got) != want
    assert differing <= 3


@pytest.mark.parametrize(("height", "width"), [(20, 400), (400, 20)])
def test_crop_window_falls_back_to_the_centre(window, height, width):
    draws = np.full(jpeg.NUM_DRAWS, 1 - 2**-24, np.float32)
    got = window(height, width, draws)
    assert tuple(got) == plain_crop_window(height, width, draws.astype(np.float64))
    assert max(got[2:]) == 27


def test_crop_area_and_ratio_have_the_stated_distribution(window):
    rng = np.random.default_rng(1)
    side = 1000
    draws = rng.random((800, jpeg.NUM_DRAWS), np.float32)
    # A square big enough that the first attempt fits unless it is both large and elongated.
    windows = np.array([window(side, side, draw) for draw in draws])
    area = windows[:, 2] * windows[:, 3] / side**2
    ratio = windows[:, 3] / windows[:, 2]
    assert area.min() > 0.079
    assert area.max() <= 1
    assert ratio.min() > 0.749
    assert ratio.max() < 1.335
    # The log ratio is symmetric; standard error 0.17 / sqrt(800).
    assert abs(np.log(ratio).mean()) < 0.03


def _smooth_image(height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    return np.rint(np.stack([255 * y, 255 * x, 127 + 127 * np.sin(6 * x * y)], -1)).astype(np.uint8)


def _encode(image: np.ndarray):
    """The JPEG bytes, and the image that they hold: what the coding lost is no concern here."""
    tf, _ = tensorflow_modules()
    encoded = tf.io.encode_jpeg(image, quality=100, chroma_downsampling=False)
    return encoded, tf.io.decode_jpeg(encoded, dct_method=ACCURATE).numpy()


@pytest.mark.parametrize("flipped", [False, True])
def test_train_image_is_the_resized_window(flipped):
    tf, _ = tensorflow_modules()
    encoded, image = _encode(_smooth_image(96, 130))
    draws = np.random.default_rng(2).random(jpeg.NUM_DRAWS, np.float32)
    draws[-1] = 0.25 if flipped else 0.75
    top, left, height, width = plain_crop_window(96, 130, draws)
    want = tf.image.resize(image[top : top + height, left : left + width], [32, 32]).numpy()
    want = want[:, ::-1] if flipped else want
    got = jpeg.decode_train(encoded, draws, 32).numpy()
    assert got.dtype == np.uint8
    np.testing.assert_array_equal(got, np.floor(want + 0.5))


@pytest.mark.parametrize(("height", "width"), [(128, 170), (170, 128), (64, 64), (200, 90)])
def test_validation_image_is_the_centre_of_the_resized_image(height, width):
    tf, _ = tensorflow_modules()
    (encoded, image), size = _encode(_smooth_image(height, width)), 56
    scale = size * 256 / 224 / min(height, width)
    shape = round(height * scale), round(width * scale)
    whole = tf.image.resize(image, shape, antialias=False).numpy()
    top, left = (shape[0] - size) // 2, (shape[1] - size) // 2
    want = whole[top : top + size, left : left + size]
    got = jpeg.decode_validation(encoded, size).numpy()
    assert got.shape == want.shape
    # Square and centre are rounded to whole pixels, up to one each way: the image's own variation
    # over a pixel bounds the difference.
    steepest = max(np.abs(np.diff(image.astype(int), axis=axis)).max() for axis in (0, 1))
    assert np.abs(got - want).max() <= steepest
    assert np.abs(got - want).mean() <= 2


@pytest.mark.realdata
def test_cropped_decoding_equals_pillows_decoding_and_cropping(tfds_data_dir):
    tf, _ = tensorflow_modules()
    from asgd_jax.data.prepared import prepared_builder
    from asgd_jax.data.streaming import _read_encoded

    builder = prepared_builder("imagenet2012", tfds_data_dir)
    draws = np.random.default_rng(3).random((8, jpeg.NUM_DRAWS), np.float32)
    encoded = _read_encoded(builder, "train", 0, 8, None).as_numpy_iterator()
    for example, draw in zip(encoded, draws, strict=True):
        bytes_ = example["image"]
        whole = np.asarray(Image.open(io.BytesIO(bytes_)).convert("RGB"))
        top, left, height, width = jpeg.crop_window(*whole.shape[:2], draw).numpy()
        crop = tf.image.resize(whole[top : top + height, left : left + width], [64, 64])
        want = np.floor(crop.numpy() + 0.5)[:, :: -1 if draw[-1] < 0.5 else 1]
        difference = np.abs(jpeg.decode_train(bytes_, draw, 64).numpy() - want)
        # Chroma is upsampled without the pixels beyond the window: only its edge may differ.
        assert np.median(difference) == 0
        assert difference[2:-2, 2:-2].mean() < 0.5
