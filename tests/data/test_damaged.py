"""Damaged records: one line that names data set, folder and cause, and nothing lost by it."""

import os
import shutil
import subprocess
import sys
from itertools import islice

import numpy as np
import pytest

from asgd_jax import data
from asgd_jax.data import prepared
from asgd_jax.training import default_config, train


def truncate(file):
    file.write_bytes(file.read_bytes()[:-3])


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGES = {
    "truncated": (truncate, "DataLossError: truncated record"),
    "wrong byte": (flip, "DataLossError: corrupted record"),
    "missing": (lambda file: file.unlink(), "No such file"),
    "empty": (lambda file: file.write_bytes(b""), "contained only"),
}


@pytest.fixture(scope="module")
def small_mnist(tmp_path_factory):
    _, tfds = prepared.tensorflow_modules()
    images = np.random.default_rng(0).integers(0, 256, (20, 28, 28, 1), np.uint8)
    features = {
        "image": tfds.features.Image(shape=(28, 28, 1)),
        "label": tfds.features.ClassLabel(num_classes=10),
    }
    examples = [(n, {"image": image, "label": n % 10}) for n, image in enumerate(images)]
    folder = tmp_path_factory.mktemp("mnist")
    tfds.dataset_builders.store_as_tfds_dataset(
        name="mnist",
        version="3.0.1",
        features=tfds.features.FeaturesDict(features),
        split_datasets={"train": examples[:12], "test": examples[12:]},
        data_dir=folder,
    )
    return folder


def damaged(whole, folder, split, damage):
    """A copy of a data set with one file of a split damaged."""
    shutil.copytree(whole, folder)
    damage(sorted(folder.rglob(f"*-{split}.tfrecord*"))[0])
    return folder


def assert_one_line(error, *parts):
    for part in (*parts, "TFDS_DATA_DIR", "--config.data_dir"):
        assert part in str(error.value)
    assert "\n" not in str(error.value)
    assert "{{" not in str(error.value)


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("split", ["train", "test"])
def test_in_memory(kind, split, small_mnist, tmp_path):
    assert len(data.load("mnist", data_dir=small_mnist).train_labels) == 12
    damage, cause = DAMAGES[kind]
    folder = damaged(small_mnist, tmp_path / "copy", split, damage)
    with pytest.raises(OSError, match="cannot be read") as error:
        data.load("mnist", data_dir=folder)
    assert_one_line(error, f"mnist in {folder}/mnist/3.0.1 ", cause)


@pytest.mark.parametrize("kind", DAMAGES)
def test_streamed(kind, labelled_stream, tmp_path):
    damage, cause = DAMAGES[kind]
    for split, read in (
        ("train", lambda folder: data.train_batches(folder, batch_size=8)),
        ("validation", lambda folder: data.validation_batches(folder, batch_size=8)),
    ):
        folder = damaged(labelled_stream, tmp_path / split, split, damage)
        with pytest.raises(OSError, match="cannot be read") as error:
            list(read(folder))
        assert_one_line(error, f"imagenet2012 in {folder}/imagenet2012/5.1.0 ", cause)


def test_a_missing_split_is_named(labelled_stream, tmp_path):
    folder = shutil.copytree(labelled_stream, tmp_path / "copy")
    info = next(folder.rglob("dataset_info.json"))
    info.write_text(info.read_text().replace('"validation"', '"other"'))
    with pytest.raises(OSError, match="cannot be read") as error:
        data.stream_sizes(folder)
    assert_one_line(error, f"imagenet2012 in {folder}", "validation")


def test_a_run_keeps_its_checkpoints(labelled_stream, tmp_path):
    folder, workdir = shutil.copytree(labelled_stream, tmp_path / "data"), tmp_path / "run"
    config = default_config()
    config.update(
        dataset="imagenet2012",
        data_dir=str(folder),
        image_size=8,
        model="mlp",
        num_workers=1,
        worker_batch_size=10,
        eval_batch_size=23,
        epochs=1,
        num_devices=1,
    )
    config.model_options.hidden = ()
    train(config, workdir)
    before = {file: file.read_bytes() for file in (workdir / "checkpoints").rglob("*")
              if file.is_file()}  # fmt: skip
    flip(sorted(folder.rglob("*-train.tfrecord*"))[2])
    config.epochs = 2
    with pytest.raises(OSError, match="cannot be read") as error:
        train(config, workdir)
    assert_one_line(error, "imagenet2012", str(folder), "corrupted record")
    assert {file: file.read_bytes() for file in before} == before


@pytest.mark.parametrize("name", ["a[b]", "a*b", "a?b", "a\udcffb"])
def test_a_folder_whose_name_tfds_takes_for_a_pattern_is_refused(name, monkeypatch, tmp_path):
    for argument, environment in ((tmp_path / name, ""), (None, str(tmp_path / name))):
        monkeypatch.setenv("TFDS_DATA_DIR", environment)
        with pytest.raises(ValueError, match=r"data_dir='.* holds '.*: set TFDS_DATA_DIR or --con"):
            data.load("mnist", data_dir=argument)
    assert list(tmp_path.iterdir()) == []


def test_every_other_character_may_stand_in_the_name(labelled_stream, tmp_path):
    folder = tmp_path / "a]b{c,d}%20e#f g=h:i$j'k\"l|m&n;o~p!q^r@é\\"
    folder.symlink_to(labelled_stream)
    assert len(list(data.validation_batches(folder, batch_size=23, image_size=8))) == 1
    labels = [labels for _, labels in islice(data.train_batches(folder, batch_size=10), 5)]
    assert len(np.unique(labels)) == 50


def test_no_home_folder_is_one_line_and_makes_no_folder_of_that_name(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prepared.os.path, "expanduser", lambda path: path)
    for folder in (None, "~/tfds", "~nobody/tfds"):
        monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
        with pytest.raises(ValueError, match=r"data_dir='~.*home folder that is not known: set TF"):
            data.load("mnist", data_dir=folder)
    assert list(tmp_path.iterdir()) == []


def test_tensorflow_makes_no_folder_for_a_user_without_a_home(tmp_path):
    code = (
        "import os, pwd; os.environ.pop('HOME', None); pwd.getpwuid = {}.__getitem__\n"
        "from asgd_jax.data.prepared import tensorflow_modules\n"
        "tf, _ = tensorflow_modules(); tf.keras.utils\n"
    )
    paths = {"PYTHONPATH": os.pathsep.join(sys.path), "TMPDIR": str(tmp_path / "tmp")}
    (tmp_path / "tmp").mkdir()
    (tmp_path / "work").mkdir()
    subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "work", env=os.environ | paths, check=True
    )
    assert list((tmp_path / "work").iterdir()) == []
