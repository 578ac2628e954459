"""Where prepared data is looked for, and the one line that is said when it is missing."""

import subprocess
import sys
import urllib.error

import pytest

from asgd_jax import data
from asgd_jax.data import prepared


@pytest.fixture
def no_network(monkeypatch):
    asked = []

    def refuse(request, timeout):
        asked.append((request.full_url, timeout))
        raise urllib.error.URLError("Name or service\nnot known")

    monkeypatch.setattr(prepared.urllib.request, "urlopen", refuse)
    return asked


def test_importing_data_imports_no_tensorflow():
    code = (
        "import sys, asgd_jax.data; "
        "print([m for m in ('tensorflow', 'tensorflow_datasets', 'sklearn') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_data_dir_comes_from_the_argument_then_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("TFDS_DATA_DIR", "/from/environment")
    assert prepared.resolve_data_dir(tmp_path) == str(tmp_path)
    assert prepared.resolve_data_dir(None) == "/from/environment"
    monkeypatch.delenv("TFDS_DATA_DIR")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert prepared.resolve_data_dir(None) == str(tmp_path / "tensorflow_datasets")
    assert prepared.resolve_data_dir("~/data") == str(tmp_path / "data")


@pytest.mark.parametrize("name", ["mnist", "cifar10", "cifar100"])
def test_missing_data_set_is_one_line_with_name_folder_and_remedies(name, no_network, tmp_path):
    with pytest.raises(data.DatasetNotFoundError) as caught:
        data.load(name, data_dir=tmp_path)
    line = str(caught.value)
    assert "\n" not in line
    for part in (name, str(tmp_path), "TFDS_DATA_DIR", "--config.data_dir", "network"):
        assert part in line
    assert isinstance(caught.value, FileNotFoundError)
    # One request, with a limit: TFDS itself would retry for minutes.
    assert len(no_network) == 1
    assert no_network[0][1] <= 10
    assert not list(tmp_path.iterdir())


def test_missing_imagenet_names_its_own_remedy(no_network, tmp_path):
    for call in (
        lambda: data.train_batches(tmp_path, batch_size=8),
        lambda: data.validation_batches(tmp_path, batch_size=8),
        lambda: data.stream_sizes(tmp_path),
    ):
        with pytest.raises(data.DatasetNotFoundError, match="tfds build imagenet2012") as caught:
            call()
        assert str(tmp_path) in str(caught.value)
    assert not no_network


def test_failed_download_is_the_same_error(monkeypatch, tmp_path):
    class Builder:
        def download_and_prepare(self):
            raise PermissionError("read-only\nfolder")

    class Reply:
        def __enter__(self):
            return self

        def __exit__(self, *exception):
            return None

    monkeypatch.setattr(prepared.urllib.request, "urlopen", lambda request, timeout: Reply())
    with pytest.raises(data.DatasetNotFoundError, match="PermissionError: read-only folder"):
        prepared._download(Builder(), "mnist", str(tmp_path))


def test_environment_counts_at_the_time_of_the_call(
    monkeypatch, no_network, labelled_stream, tmp_path
):
    monkeypatch.setenv("TFDS_DATA_DIR", str(labelled_stream))
    assert data.stream_sizes().num_train == 50
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    with pytest.raises(data.DatasetNotFoundError):
        data.stream_sizes()


def test_a_folder_is_opened_once_and_a_missing_one_is_looked_for_again(
    no_network, labelled_stream, tmp_path
):
    builder = prepared.prepared_builder("imagenet2012", labelled_stream)
    assert prepared.prepared_builder("imagenet2012", str(labelled_stream)) is builder
    link = tmp_path / "later"
    with pytest.raises(data.DatasetNotFoundError):
        prepared.prepared_builder("imagenet2012", link)
    link.symlink_to(labelled_stream)
    assert prepared.prepared_builder("imagenet2012", link) is not builder


def test_tensorflow_sees_no_gpu():
    tf, _ = prepared.tensorflow_modules()
    assert tf.config.get_visible_devices("GPU") == []
