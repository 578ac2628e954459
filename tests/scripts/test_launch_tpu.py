"""scripts/launch_tpu.sh: the commands it prints are those it runs, and mistakes cost no TPU."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "launch_tpu.sh"
TPU = ["--name=tpu-1", "--zone=us-west4-a"]
# With a --repo nothing depends on what this checkout has committed.
REPO = ["--repo=https://example.org/asgd_jax.git", "--ref=v1"]
RUN = ["--config=configs/mnist_cnn.py:asgd", "--workdir=gs://bucket/runs/a", *REPO]
ALL = [*TPU, *RUN, "--type=v5litepod-16"]
HOSTILE = [
    "--config.delay_trace=it's",
    "--config.data_dir=$HOME `id` $(id) \\ \"quoted\"",
    "--config.model=a; rm -rf /tmp/nothing & echo *",
    "--config.dtype=a=b && c | d > e",
    "--config.dataset='''",
]  # fmt: skip

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


def launch(*arguments, path=None):
    environment = {**os.environ, **({"PATH": path} if path else {})}
    return subprocess.run(
        [shutil.which("bash"), SCRIPT, *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=60,
        check=False,
    )


def dry_run(step, *arguments):
    """The commands that a step would run, as lists of words."""
    done = launch(step, "--dry-run", *arguments)
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()]


def remote(command):
    """The words of the command that gcloud is to run on the workers."""
    option = next(word for word in command if word.startswith("--command="))
    return shlex.split(option.removeprefix("--command="))


@pytest.fixture
def fake_gcloud(tmp_path):
    """A gcloud on the PATH that writes its words to a log and fails where it is told to."""
    folder = tmp_path / "bin"
    folder.mkdir()
    log = tmp_path / "log"
    log.touch()
    program = folder / "gcloud"
    program.write_text(
        f"#!{sys.executable}\n"
        "import json, os, sys\n"
        f"open({str(log)!r}, 'a').write(json.dumps(['gcloud', *sys.argv[1:]]) + '\\n')\n"
        "sys.exit(7 if os.environ.get('FAIL', '\\0') in ' '.join(sys.argv) else 0)\n"
    )
    program.chmod(0o755)

    def read():
        return [json.loads(line) for line in log.read_text().splitlines()]

    return f"{folder}{os.pathsep}{os.environ['PATH']}", read


def test_is_valid_bash():
    done = subprocess.run(["bash", "-n", SCRIPT], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_all_goes_from_create_to_delete():
    commands = dry_run("all", *ALL, "--project=p", "--spot", "--data-dir=gs://bucket/tfds")
    verbs = [words[4] for words in commands if words[1] == "compute"]
    assert verbs == ["create", *["ssh"] * 4, "delete"]
    for words in commands:
        if words[1] == "compute":
            assert words[:4] == ["gcloud", "compute", "tpus", "tpu-vm"]
            assert words[5] == "tpu-1"
            assert {"--project=p", "--zone=us-west4-a"} <= set(words)
            assert ("--worker=all" in words) == (words[4] == "ssh")
    assert {"--accelerator-type=v5litepod-16", "--version=v2-alpha-tpuv5-lite", "--spot"} <= set(
        commands[0]
    )
    train = remote(commands[4])
    assert train[train.index("exec") :] == [
        "exec", "../asgd_env/bin/python", "scripts/train.py",
        "--config=configs/mnist_cnn.py:asgd", "--workdir=$HOME/gcs/bucket/runs/a",
        "--config.multihost=true", "--config.data_dir=gs://bucket/tfds",
    ]  # fmt: skip
    mount = " ".join(train[: train.index("exec")])
    assert "gcsfuse" in mount
    assert "bucket ~/gcs/bucket" in mount
    assert commands[-2][:3] == ["gcloud", "storage", "rsync"]
    assert commands[-2][-2:] == ["gs://bucket/runs/a", "runs/tpu-1"]


def test_the_steps_one_by_one_are_all():
    steps = ("create", "install", "run", "collect", "delete")
    assert dry_run("all", *ALL) == [words for step in steps for words in dry_run(step, *ALL)]


def test_what_is_printed_is_what_is_run(fake_gcloud, tmp_path):
    path, read = fake_gcloud
    arguments = [*ALL, "--spot", f"--out={tmp_path / 'it is here'}", "--", *HOSTILE]
    done = launch("all", *arguments, path=path)
    assert done.returncode == 0, done.stderr
    assert read() == [words for words in dry_run("all", *arguments) if words[0] == "gcloud"]
    assert (tmp_path / "it is here").is_dir()


def test_dry_run_runs_nothing(fake_gcloud, tmp_path):
    path, read = fake_gcloud
    for step in ("create", "install", "run", "logs", "stop", "collect", "delete", "all"):
        done = launch(step, *ALL, f"--out={tmp_path / 'out'}", "--dry-run", path=path)
        assert done.returncode == 0, done.stderr
    assert read() == []
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("detach", [False, True])
def test_train_options_reach_train_py_untouched(detach, tmp_path):
    """Executed by a real shell, with a program in place of train.py that reports its words."""
    (tmp_path / "asgd_jax" / "scripts").mkdir(parents=True)
    (tmp_path / "asgd_env" / "bin").mkdir(parents=True)
    (tmp_path / "asgd_env" / "bin" / "python").symlink_to(sys.executable)
    report = "import json, sys; json.dump(sys.argv[1:], open('../words', 'w'))"
    (tmp_path / "asgd_jax" / "scripts" / "train.py").write_text(report)
    [command] = dry_run(
        "run", *TPU, *REPO, "--config=configs/a.py:b c", "--workdir=runs/it's here",
        *(["--detach"] if detach else []), "--", *HOSTILE,
    )  # fmt: skip
    line = command[-2].removeprefix("--command=")
    # `wait` for what goes on in the background.
    subprocess.run(["bash", "-c", f"{line}\nwait"], cwd=tmp_path, check=True, timeout=60)
    assert json.loads((tmp_path / "words").read_text()) == [
        "--config=configs/a.py:b c", "--workdir=runs/it's here", "--config.multihost=true",
        *HOSTILE,
    ]  # fmt: skip
    assert int((tmp_path / "train.pid").read_text()) > 1
    assert (tmp_path / "train.log").exists() == detach


def test_the_last_commit_is_what_is_copied():
    if subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True).returncode:
        pytest.skip("not a git checkout")
    bundle, copy, install, *_ = dry_run("install", *TPU)
    assert bundle[:5] == ["git", "-C", str(ROOT), "bundle", "create"]
    assert bundle[-1] == "HEAD"
    assert copy[4:8] == ["scp", bundle[-2], "tpu-1:asgd_jax.bundle", "--worker=all"]
    words = remote(install)
    assert words[words.index("clone") + 1 :][:3] == ["--quiet", "asgd_jax.bundle", "asgd_jax"]
    assert "asgd_jax[train,tpu]" in words
    assert "asgd_jax/requirements.txt" in words


def test_a_repository_is_cloned_at_its_ref():
    words = remote(dry_run("install", *TPU, *REPO)[0])
    assert words[words.index("clone") + 1 :][:4] == [
        "--quiet", "--branch=v1", "https://example.org/asgd_jax.git", "asgd_jax",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("workdir", "source"),
    [("runs/a", "tpu-1:asgd_jax/runs/a"), ("/mnt/nfs/a b", "tpu-1:/mnt/nfs/a b")],
)
def test_a_folder_is_collected_from_the_first_worker(workdir, source):
    _, words = dry_run("collect", *TPU, f"--workdir={workdir}", "--out=results/x")
    assert words[4:9] == ["scp", source, "results/x", "--recurse", "--worker=0"]


@pytest.mark.parametrize(
    ("accelerator", "version"),
    [
        ("v3-8", "tpu-ubuntu2204-base"),
        ("v4-32", "tpu-ubuntu2204-base"),
        ("v5p-8", "v2-alpha-tpuv5"),
        ("v6e-16", "v2-alpha-tpuv6e"),
    ],
)
def test_the_software_version_follows_the_type(accelerator, version):
    [words] = dry_run("create", *TPU, f"--type={accelerator}")
    assert f"--version={version}" in words
    [words] = dry_run("create", *TPU, f"--type={accelerator}", "--version=mine")
    assert "--version=mine" in words


def test_a_failure_stops_before_delete_and_says_what_is_left(fake_gcloud, tmp_path, monkeypatch):
    path, read = fake_gcloud
    monkeypatch.setenv("FAIL", "scripts/train.py")
    done = launch("all", *ALL, f"--out={tmp_path / 'out'}", path=path)
    assert done.returncode == 7
    assert "scripts/train.py" in " ".join(read()[-1])
    assert done.stderr.strip().splitlines() == [
        "launch_tpu.sh: stopped; tpu-1 may exist and cost money: resume with the run step, "
        "or delete it"
    ]


MISTAKES = {
    "no step": ([], "needs a step: create, install"),
    "unknown step": (["fly", *TPU], "unknown step fly: use create"),
    "no name": (["create", "--zone=us-west4-a"], "create needs --name=NAME"),
    "no zone": (["delete", "--name=tpu-1"], "delete needs --zone=ZONE"),
    "no type": (["create", *TPU], "create needs --type=TYPE"),
    "no config": (["run", *TPU, "--workdir=a"], "run needs --config=configs/X.py"),
    "no workdir": (["run", *TPU, *REPO, "--config=configs/a.py"], "run needs --workdir="),
    "nothing to collect": (["collect", *TPU], "collect needs --workdir="),
    "all without a type": (["all", *TPU, *RUN], "all needs --type=TYPE"),
    "unknown option": (["create", *ALL, "--sopt"], "unknown option --sopt: see --help"),
    "stray word": (["create", *ALL, "tpu-2"], "unknown option tpu-2: see --help"),
    "no value": (["create", *ALL, "--name", "x"], "--name needs a value: --name=VALUE"),
    "name as option": (["delete", *TPU, "--name=-x"], "--name=-x: use lower-case letters"),
    "name with a space": (["delete", *TPU, "--name=a b"], "--name=a b: use lower-case letters"),
    "zone": (["delete", "--name=a", "--zone=--quiet"], "--zone=--quiet is no zone"),
    "type": (["create", *TPU, "--type=v9-8"], "no default software for --type=v9-8"),
    "foreign config": (
        ["run", *TPU, *REPO, "--workdir=a", "--config=/etc/passwd"],
        "--config=/etc/passwd: name a file of the repository",
    ),
    "config that is not committed": (
        ["run", *TPU, "--workdir=a", "--config=configs/none.py"],
        "configs/none.py is not in the last commit",
    ),
    "bucket without folder": (
        ["run", *TPU, *RUN, "--workdir=gs://bucket"],
        "--workdir=gs://bucket is no folder of a bucket",
    ),
    "workdir as option": (["collect", *TPU, "--workdir=-r"], "cannot begin with -"),
    "train option in front": (["run", *TPU, *RUN, "--config.delay=3"], "belongs behind --"),
    "other option behind": (["run", *TPU, *RUN, "--", "--lr=3"], "only --config.FIELD=VALUE"),
    "detached all": (["all", *ALL, "--detach"], "all cannot --detach"),
    "ref of nothing": (["install", *TPU, "--ref=v1"], "--ref=v1 needs --repo=URL"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_calls_nobody(mistake, fake_gcloud):
    arguments, message = MISTAKES[mistake]
    path, read = fake_gcloud
    done = launch(*arguments, path=path)
    assert done.returncode == 2
    assert done.stdout == ""
    [line] = done.stderr.splitlines()
    assert line.startswith("launch_tpu.sh: ")
    assert message in line
    assert read() == []


def test_a_missing_gcloud_is_named(tmp_path):
    for tool in ("bash", "dirname", "git", "env"):
        found = shutil.which(tool)
        if found:
            (tmp_path / tool).symlink_to(found)
    done = launch("delete", *TPU, path=str(tmp_path))
    assert done.returncode == 2
    assert done.stderr.startswith("launch_tpu.sh: gcloud is not installed")


def test_the_commands_of_the_documentation_are_valid():
    text = (ROOT / "docs" / "running_on_cloud_tpu.md").read_text()
    blocks = re.findall(r"(?:^    +\S.*\n|^\n)+", text, re.MULTILINE)
    script = "".join(block for block in blocks if "launch_tpu" in block or "options=" in block)
    assert script.count("scripts/launch_tpu.sh") >= 10
    script = re.sub(r"(scripts/launch_tpu.sh \w+)", r"\1 --dry-run --repo=URL", script)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert "--config.seed=1" in done.stdout


def test_help_names_every_step():
    done = launch("--help")
    assert done.returncode == 0
    for step in ("create", "install", "run", "logs", "stop", "collect", "delete", "all"):
        assert f"\n  {step} " in done.stdout
