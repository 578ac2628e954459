"""scripts/train.py as a user runs it: results, and one clear line for every mistake."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from asgd_jax.training.command import named_folder, use_compilation_cache

ROOT = Path(__file__).parents[2]
BASE = f"--config={ROOT}/configs/digits.py"
QUICK = [
    "--config.model=mlp", "--config.num_train=256", "--config.num_workers=4",
    "--config.worker_batch_size=16", "--config.epochs=1",
]  # fmt: skip


def load_script(name):
    spec = importlib.util.spec_from_file_location(f"{name}_script", ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


script = load_script("train")


def run_train(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "scripts/train.py", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
        timeout=240,
        check=False,
    )


def config_of(*arguments):
    return script.parse([*arguments, "--workdir=run"]).config


def test_trains_with_overrides_in_a_folder_of_any_name(tmp_path):
    """A real process; its home is not known, as in a container of a user without a name."""
    workdir = tmp_path / "lr=.2 {a}%b#c"
    done = run_train(
        f"{BASE}:asgd", *QUICK, "--config.delay=3", "--config.learning_rate=0.2",
        f"--workdir={workdir}", HOME="", XDG_CACHE_HOME="/proc/none",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "completed after 16 steps" in done.stdout
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary["config"]["delay"] == 3
    assert summary["learning_rate"] == pytest.approx(0.2 / 3)


def test_a_diverged_run_exits_with_zero_and_says_so(tmp_path, capsys):
    arguments = [BASE, *QUICK, "--config.learning_rate=1e9", f"--workdir={tmp_path / 'run'}"]
    assert script.main(arguments) == 0
    assert "diverged after" in capsys.readouterr().out


MISTAKES = {
    "negative delay": (["--config.delay=-1"], "delay must be an integer >= 0, got -1"),
    "fractional delay": (["--config.delay=1.5"], "delay"),
    "wrong divisibility": (["--config.delay=4"], "delay + 1 must divide num_workers; use delay=3"),
    "unknown dataset": (["--config.dataset=svhn"], "unknown data set 'svhn': use one of digits"),
    "unknown model": (["--config.model=lenet"], "unknown model 'lenet': choose one of"),
    "unknown option": (["--config.conv_impl=im2col"], "conv_impl must be one of"),
    "unknown optimizer": (["--config.optimizer=lion"], "unknown optimizer='lion': use one of sgd"),
    "initials": (["--config.lr=1"], "unknown field lr: did you mean learning_rate?"),
    "slip": (["--config.lerning_rate", "1"], "lerning_rate: did you mean learning_rate?"),
    "switch": (["--noconfig.augmnt"], "unknown field augmnt: did you mean augment?"),
    "strange field": (["--config.zzz=1"], "unknown field zzz: default_config lists all fields"),
    "field of a field": (["--config.seed.x=1"], "unknown field seed.x"),
    "field of options": (["--config.model_options.hiden=1"], "unknown field model_options.hiden"),
    "unknown flag": (["--wrokdir=x"], "wrokdir"),
    "stray word": (["run"], "unexpected argument 'run': options start with --"),
    "unknown arm": ([f"{BASE}:adsg"], "unknown arm 'adsg'"),
    "unknown config": (["--config=configs/nothing.py"], "--config=configs/nothing.py: there is no"),
    "bad number": (["--config.learning_rate=-1"], "learning_rate must be a number > 0, got -1"),
    "no number": (["--config.learning_rate=x"], "--config.learning_rate=x: "),
    "word in a tuple": (["--config.decay_epochs=a"], "decay_epochs must be increasing numbers"),
    "open tuple": (["--config.decay_epochs=(1,"], "--config.decay_epochs=(1,: "),
    "falling tuple": (["--config.decay_epochs=(2,1)"], "decay_epochs must be increasing numbers"),
    "early decay": (["--config.decay_epochs=-1"], "decay_epochs must be increasing numbers in 0"),
    "infinite decay": (["--config.decay_epochs=1e999"], "decay_epochs must be increasing numbers"),
    "huge seed": ([f"--config.seed={'9' * 20}"], "seed must be a number >= 0 and < 4.29497e+09"),
    "aliased seed": (["--config.seed=4294967296"], "seed must be a number >= 0 and < 4.29497e+09"),
    "negative seed": (["--config.seed=-1"], "seed must be a number >= 0"),
    "huge count": (["--config.epochs=2147483648"], "epochs=2147483648 is too large: at most 21474"),
    "no dtype": (["--config.dtype=(1,"], "dtype='(1,' is no floating-point dtype"),
    "pattern": (["--workdir=none/[run]"], "/none/[run]' holds '[', which checkpoints cannot be"),
    "nobody's home": (["--workdir=~nobody.here/x"], "workdir='~nobody.here/x' begins with a home"),
    "bucket": (["--workdir=gs://bucket/run"], "workdir='gs://bucket/run' must be a folder: mount"),
    "data in a pattern": (
        ["--config.dataset=mnist", "--config.data_dir=/none/[x]"], "data_dir='/none/[x]' holds '['"
    ),
    "missing trace": (
        ["--config.delay_distribution=trace", "--config.delay_trace=none.npy"],
        "delay_trace='none.npy' cannot be read",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing(mistake, tmp_path, capsys, monkeypatch):
    wrong, message = MISTAKES[mistake]
    monkeypatch.chdir(tmp_path)
    assert script.main([BASE, *QUICK, "--workdir=run", *wrong]) == 2
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("train.py: ")
    assert message in lines[0]
    assert captured.out == ""
    assert list(tmp_path.iterdir()) == []


def test_a_mistake_of_a_real_process_is_one_line_too(tmp_path):
    done = run_train(BASE, *QUICK, "--config.lr=1", f"--workdir={tmp_path / 'run'}")
    assert done.returncode == 2
    assert done.stderr == "train.py: unknown field lr: did you mean learning_rate?\n"
    assert list(tmp_path.iterdir()) == []


def test_folders_and_arms_may_hold_colons(tmp_path):
    text = (ROOT / "configs" / "digits.py").read_text()
    folder = tmp_path / "a:b" / "c.py:d"
    folder.mkdir(parents=True)
    (folder / "digits.py").write_text(text)
    assert config_of(f"--config={folder}/digits.py:asgd").delay == 32
    assert config_of(f"--config={folder}/digits.py").delay == 0
    assert config_of("--config", f"{folder}/digits.py", "--config.delay", "2").delay == 2
    arms = "def get_config(arm):\n    raise ValueError(f'no arm {arm}')\n"
    (folder / "x:y.py").write_text(arms)
    with pytest.raises(ValueError, match=r"^no arm a:b$"):
        config_of(f"--config={folder}/x:y.py:a:b")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def get_config(:", r"c\.py: SyntaxError: .*line 1"),
        ("import nothing_of_this_name", r"c\.py: ModuleNotFoundError: No module named"),
        ("x = 1", r"c\.py: KeyError: 'get_config'"),
        ("def get_config(): pass", r"c\.py: get_config must return a ConfigDict, got None"),
        ("def get_config(): return 1 / 0", r"c\.py: ZeroDivisionError: division by zero"),
    ],
)
def test_a_broken_config_file_is_named(text, message, tmp_path):
    (tmp_path / "c.py").write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        config_of(f"--config={tmp_path}/c.py")
    assert "\n" not in str(error.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["c.py"]


def test_overrides_have_the_types_of_the_fields():
    config = config_of(
        BASE, "--config.decay_epochs=(1,2.5)", "--config.augment", "--config.seed=4294967295",
        "--config.num_train=7", "--config.learning_rate=1", "--config.data_dir=x=y",
    )  # fmt: skip
    assert (config.decay_epochs, config.augment, config.seed) == ((1, 2.5), True, 2**32 - 1)
    assert (config.num_train, config.data_dir) == (7, "x=y")
    assert isinstance(config.learning_rate, float)


def test_a_tilde_is_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert script.parse([BASE, "--workdir=~/x"]).workdir == tmp_path / "x"
    assert named_folder("a/~", "out") == Path("a/~")


@pytest.mark.parametrize(
    ("name", "arguments"), [("reproduce", ["--figure=1"]), ("bench", ["--only=calculator"])]
)
@pytest.mark.parametrize("folder", ["gs://bucket/x", "~nobody.here/x"])
def test_the_other_scripts_refuse_such_folders_too(
    name, arguments, folder, monkeypatch, capsys, tmp_path
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(use_compilation_cache()))
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments, f"--out={folder}"])
    with pytest.raises(SystemExit) as stop:
        sys.exit(load_script(name).main())
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith(f"{name}.py: out='{folder}' ")
    assert list(tmp_path.iterdir()) == []


def test_warnings_of_libraries_are_shown_and_what_they_raise_besides_is_not():
    code = (
        "import runpy; from absl import logging; runpy.run_path('scripts/train.py')['quiet']()\n"
        "logging.info('opened'); logging.warning('skipped'); logging.error('raised')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr.splitlines()[-1].endswith("skipped")
    assert "opened" not in done.stderr
    assert "raised" not in done.stderr


def test_a_plan_is_printed_without_a_run(capsys):
    assert script.main([BASE, "--config.delay=32", "--plan"]) == 0
    out = capsys.readouterr().out
    assert "memory a device, digits_cnn on digits, delay 32 (MiB)" in out
    assert "history" in out


def test_missing_arguments_are_named(capsys):
    for arguments in ([BASE], ["--workdir=x"], []):
        assert script.main(arguments) == 2
        message = "train.py: needs --config=configs/X.py and --workdir=DIR\n"
        assert capsys.readouterr().err == message


def test_missing_data_is_one_line_with_both_remedies(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    arguments = [
        f"--config={ROOT}/configs/mnist_cnn.py", f"--config.data_dir={tmp_path / 'none'}",
        f"--workdir={tmp_path / 'run'}",
    ]  # fmt: skip
    assert script.main(arguments) == 2
    line = capfd.readouterr().err.strip().splitlines()[-1]
    assert "mnist is not in" in line
    assert str(tmp_path / "none") in line
    assert "TFDS_DATA_DIR" in line
    assert "download" in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0 and not Path("/proc").is_dir(), reason="needs /proc as root")
def test_an_unwritable_folder_is_one_line(capsys):
    folder = "/proc/asgd_run"  # not writable, for root either
    assert script.main([BASE, *QUICK, f"--workdir={folder}"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert folder in lines[0]
