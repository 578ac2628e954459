"""Reports how many bytes of a sharded history lie on each device, for meshes of fake devices."""

import json
import sys

import jax

from asgd_jax.training import default_config
from asgd_jax.training.setup import set_up
from benchmarks.harness import tree_bytes


def history_bytes(num_devices: int) -> dict[str, int]:
    """Returns the bytes of the ring in all and on the device that holds most."""
    config = default_config()
    config.update(
        model="mlp",
        num_devices=num_devices,
        shard_history=True,
        num_workers=33,
        delay=32,
        worker_batch_size=8,
    )
    config.model_options.hidden = (256, 256)
    history = set_up(config).state.opt_state.history
    on_device = dict[int, int]()
    for leaf in jax.tree.leaves(history):
        for shard in leaf.addressable_shards:
            on_device[shard.device.id] = on_device.get(shard.device.id, 0) + shard.data.nbytes
    return {
        "devices": num_devices,
        "history (bytes/device)": max(on_device.values()),
        "history (bytes)": tree_bytes(history),
    }


def main() -> None:
    """Serves requests from standard input until it is closed."""
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        print(json.dumps(history_bytes(json.loads(line)["devices"])), flush=True)


if __name__ == "__main__":
    main()
