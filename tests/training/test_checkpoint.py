"""Checkpoints without a run: bit for bit there and back, and what is refused."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from asgd_jax.training import checkpoint, set_up, train
from asgd_jax.training.advance import make_advance
from asgd_jax.training.checkpoint import checksum, last_step, open_checkpoints, refuse_mismatch

FINGERPRINT = {"model": "mlp", "delay": 3}


def a_state(seed=0, shape=(3, 40, 7)):
    """A pytree with every kind of node and dtype that a train state may have."""
    keys = jax.random.split(jax.random.PRNGKey(seed), 3)
    return {
        "ring": (jax.random.normal(keys[0], shape), {}),
        "half": jax.random.normal(keys[1], (5, 3)).astype(jnp.bfloat16),
        "bits": jax.random.bits(keys[2], (4,), jnp.uint16),
        "count": jnp.asarray(7, jnp.int32),
        "key": jax.random.PRNGKey(seed),
    }


def copied(state):
    return jax.tree.map(jnp.copy, state)


def assert_same(state, other):
    assert jax.tree.structure(state) == jax.tree.structure(other)
    for left, right in zip(jax.tree.leaves(state), jax.tree.leaves(other), strict=True):
        assert (left.dtype, left.shape) == (right.dtype, right.shape)
        assert np.asarray(left).tobytes() == np.asarray(right).tobytes()


def write(workdir, *steps, keep=3, errors=None):
    checkpoints = open_checkpoints(workdir, FINGERPRINT, keep=keep)
    for step in steps:
        checkpoints.save(step, a_state(step), {"step": step}, (errors or {}).get(step))
    checkpoints.close()


def read(workdir, fingerprint=FINGERPRINT, template=None):
    checkpoints = open_checkpoints(workdir, fingerprint)
    try:
        return checkpoints.restore(a_state(99) if template is None else template)
    finally:
        checkpoints.close()


def contents(folder):
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_state_comes_back_bit_for_bit_with_its_progress(tmp_path):
    assert read(tmp_path) is None
    checkpoints = open_checkpoints(tmp_path, FINGERPRINT)
    progress = {"loss": float(np.float32(0.1)), "last": {"gap": float("nan")}, "best": None}
    checkpoints.save(4, a_state(4), progress)
    checkpoints.close()
    state, found = read(tmp_path)
    assert_same(state, a_state(4))
    assert np.float32(found["loss"]) == np.float32(0.1)
    assert np.isnan(found["last"]["gap"])
    assert found["best"] is None


def test_a_state_donated_while_it_is_written_is_written_as_it_was(tmp_path):
    """Large enough to be under way still when the next steps write into its memory."""
    step = jax.jit(lambda state: jax.tree.map(lambda x: x + x, state), donate_argnums=0)
    state = {"ring": jax.random.normal(jax.random.PRNGKey(0), (2_000_000,))}
    checkpoints = open_checkpoints(tmp_path, FINGERPRINT)
    want = np.array(state["ring"])
    checkpoints.save(1, state, {})
    for _ in range(20):
        state = step(state)
    checkpoints.close()
    found, _ = read(tmp_path, template=state)
    np.testing.assert_array_equal(found["ring"], want)


@pytest.mark.parametrize(
    "changes",
    [
        {"momentum": 0.9, "momentum_kind": "shifted", "history_dtype": "bfloat16"},
        {"num_devices": 8, "shard_history": True, "worker_batch_size": 16},
        {"num_devices": 4, "parallelism": "pmap"},
    ],
    ids=["shifted_bfloat16", "sharded", "pmap"],
)
def test_a_train_state_keeps_its_shardings_and_may_be_donated(tiny_config, changes, tmp_path):
    tiny_config.update(delay=3, **changes)
    tiny_config.model_options.hidden = (64,)
    setup = set_up(tiny_config)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, setup.state)
    advance, put, get = make_advance(tiny_config, setup), setup.placement.put, setup.placement.get
    placed, _ = advance(put(setup.state), 0, 0, 5)
    state = get(placed)
    checkpoints = open_checkpoints(tmp_path, FINGERPRINT)
    checkpoints.save(5, state, {})
    checkpoints.close()
    restored, _ = read(tmp_path, template=set_up(tiny_config).state)
    assert_same(restored, state)
    for leaf, sharding in zip(jax.tree.leaves(restored), jax.tree.leaves(shardings), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    assert_same(get(advance(put(restored), 0, 5, 9)[0]), get(advance(placed, 0, 5, 9)[0]))


def test_the_last_ones_and_the_best_are_kept(tmp_path):
    errors = {10: 0.5, 20: 0.2, 30: 0.3, 50: float("nan"), 60: 0.25}
    write(tmp_path, 10, 20, 30, keep=2, errors=errors)
    write(tmp_path, 40, 50, 60, keep=2, errors=errors)  # also what an earlier process wrote
    assert sorted(int(entry.name) for entry in (tmp_path / "checkpoints").iterdir()) == [20, 50, 60]
    assert last_step(tmp_path) == 60
    assert_same(read(tmp_path)[0], a_state(60))


def test_another_fingerprint_is_refused_by_name_and_changes_nothing(tmp_path):
    write(tmp_path, 1)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"checkpoints/1 has delay=3 and .*delay=7.*workdir"):
        read(tmp_path, {**FINGERPRINT, "delay": 7})
    with pytest.raises(ValueError, match=r"has seed=None and this configuration seed=1"):
        read(tmp_path, {**FINGERPRINT, "seed": 1})
    assert contents(tmp_path) == before
    refuse_mismatch(FINGERPRINT, dict(FINGERPRINT), Path("x"))


def test_other_shapes_and_other_leaves_are_refused_by_name(tmp_path):
    write(tmp_path, 1)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"holds float32\[3, 40, 7\] as ring/0 .* float32\[2, 40"):
        read(tmp_path, template=a_state(shape=(2, 40, 7)))
    with pytest.raises(ValueError, match=r"holds nothing as extra .* needs int32\[\]"):
        read(tmp_path, template=a_state() | {"extra": jnp.asarray(1)})
    assert contents(tmp_path) == before


def damage(file, kind):
    content = file.read_bytes()
    if kind == "deleted":
        file.unlink()
    elif kind == "flipped":
        middle = len(content) // 2
        file.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    else:
        file.write_bytes(content[: len(content) // 2 if kind == "truncated" else 0])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax, failing
@pytest.mark.parametrize("kind", ["truncated", "empty", "deleted", "flipped"])
def test_damage_to_any_file_is_harmless_or_refused_and_never_overwritten(kind, tmp_path):
    """No damage to a file that matters may yield another state than the one saved."""
    write(tmp_path / "good", 1, 2)
    files = sorted((tmp_path / "good" / "checkpoints" / "2").rglob("*"))
    refused = 0
    for number, file in enumerate(file for file in files if file.is_file()):
        bad = tmp_path / f"bad{number}"
        shutil.copytree(tmp_path / "good", bad)
        damage(bad / file.relative_to(tmp_path / "good"), kind)
        before = contents(bad)
        message = None
        try:
            state, progress = read(bad)
        except ValueError as error:
            message = str(error)
        if message is None:
            assert_same(state, a_state(2))
            assert progress == {"step": 2}
        else:
            refused += 1
            assert f"{bad / 'checkpoints' / '2'} is" in message
            assert "delete it" in message
            assert "\n" not in message
        assert contents(bad) == before
        shutil.rmtree(bad / "checkpoints" / "2")
        assert_same(read(bad)[0], a_state(1))
    assert refused >= 3


def test_a_foreign_folder_is_refused(tmp_path):
    write(tmp_path, 1)
    folder = tmp_path / "checkpoints"
    (folder / "9").mkdir()
    (folder / "9" / "precious").write_text("mine")
    with pytest.raises(ValueError, match=r"checkpoints/9 is no checkpoint of asgd_jax"):
        read(tmp_path)
    meta = folder / "9" / "meta" / "metadata"
    meta.parent.mkdir()
    meta.write_text(json.dumps({"format": "theirs"}))
    with pytest.raises(ValueError, match=r"no checkpoint of this version"):
        read(tmp_path)
    assert (folder / "9" / "precious").read_text() == "mine"


def test_what_was_left_half_written_is_skipped_and_can_be_written_again(tmp_path):
    write(tmp_path, 1, 2)
    folder = tmp_path / "checkpoints"
    (folder / "2").rename(folder / "2.orbax-checkpoint-tmp")
    assert last_step(tmp_path) == 1
    checkpoints = open_checkpoints(tmp_path, FINGERPRINT)
    state, progress = checkpoints.restore(a_state(99))
    assert_same(state, a_state(1))
    assert progress == {"step": 1}
    checkpoints.save(2, a_state(2), {})
    checkpoints.close()
    assert sorted(entry.name for entry in folder.iterdir()) == ["1", "2"]
    assert_same(read(tmp_path)[0], a_state(2))


def test_what_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "checkpoints").write_text("a file in the way")
    with pytest.raises(OSError, match=r"cannot write checkpoints to .*: ") as raised:
        open_checkpoints(tmp_path, FINGERPRINT)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["a[b]", "a*b", "a?b", "a\\b", "a\udcffb"])
def test_a_folder_that_would_lose_its_checkpoints_is_refused_before_it_is_made(
    name, tiny_config, tmp_path, monkeypatch
):
    (tmp_path / "[cwd]").mkdir()
    for call in (
        lambda: open_checkpoints(tmp_path / name / "run", FINGERPRINT),
        lambda: train(tiny_config, tmp_path / name / "run"),
    ):
        with pytest.raises(ValueError, match=r"workdir=.* checkpoints cannot be kept below: name"):
            call()
    monkeypatch.chdir(tmp_path / "[cwd]")
    with pytest.raises(ValueError, match=r"\[cwd\]/run' holds '\['"):
        train(tiny_config, "run")
    assert [entry.name for entry in tmp_path.rglob("*")] == ["[cwd]"]


def test_every_other_character_may_stand_in_the_name(tmp_path):
    workdir = tmp_path / "a]b{c,d}%20e#f g=h:i$j'k\"l|m&n;o~p!q^r@é\n" / "-.orbax-checkpoint-tmp"
    write(workdir, 1)
    write(workdir, 2)
    assert_same(read(workdir)[0], a_state(2))


def test_a_checkpoint_that_cannot_be_read_back_is_not_counted_as_saved(tmp_path, monkeypatch):
    """Orbax itself, in a folder where it skips a part of the work and only warns."""
    monkeypatch.setattr(checkpoint, "refuse_pattern", lambda workdir: None)
    lost = r"cannot write .*: step 1 cannot be read back: NOT_FOUND"
    checkpoints = open_checkpoints(tmp_path / "[run]", FINGERPRINT)
    checkpoints.save(1, a_state(), {})
    with pytest.raises(OSError, match=lost):
        checkpoints.save(2, a_state(), {})
    checkpoints.close()  # said once
    assert last_step(tmp_path / "[run]") == 1
    checkpoints = open_checkpoints(tmp_path / "[other]", FINGERPRINT)
    checkpoints.save(1, a_state(), {})
    with pytest.raises(OSError, match=lost):
        checkpoints.close()


def test_a_step_that_orbax_skips_is_not_counted_as_saved(tmp_path):
    write(tmp_path, 4)
    checkpoints = open_checkpoints(tmp_path, FINGERPRINT)
    with pytest.raises(OSError, match=r"cannot write .*: step 3 is not later than step 4"):
        checkpoints.save(3, a_state(), {})
    checkpoints.close()


def test_every_bit_and_every_order_changes_the_checksum():
    state = {"a": jnp.arange(1.0, 7.0).reshape(2, 3), "b": jnp.asarray([[1], [2]], jnp.int32)}
    seen = {checksum(state)}
    assert checksum(copied(state)) in seen
    for row, column in np.ndindex(2, 3):
        for bit in (0, 17, 31):
            values = np.array(state["a"])
            values.view(np.uint32)[row, column] ^= np.uint32(1 << bit)
            seen.add(checksum(state | {"a": jnp.asarray(values)}))
    seen.add(checksum(state | {"a": state["a"][::-1]}))
    seen.add(checksum(state | {"a": state["a"][:, ::-1]}))
    seen.add(checksum(state | {"b": state["b"][::-1]}))
    assert len(seen) == 1 + 18 + 3
    sharded = jax.device_put(
        jnp.arange(16.0).reshape(8, 2),
        jax.NamedSharding(jax.make_mesh((8,), ("x",)), jax.P("x")),
    )
    assert checksum(sharded) == checksum(jnp.arange(16.0).reshape(8, 2))


def test_importing_the_package_does_not_import_orbax():
    code = "import sys, asgd_jax.training; sys.exit('orbax' in sys.modules)"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=120)
