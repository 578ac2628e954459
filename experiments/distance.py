"""How far what was run is from the paper's setting: read off the two configurations."""

from collections.abc import Callable, Mapping
from typing import Any

from asgd_jax.data import FACTS

_NUMERIC = "numeric: thresholds, no training"
_PAPERS_PANELS = ("vgg", "resnet")  # of figures with several: fig. 3's, fig. 11's


def papers_panel(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns that part of a figure's configuration whose setting is the paper's.

    >>> papers_panel({"digits": {"seeds": (0,)}, "resnet": {"seeds": (1,)}})
    {'seeds': (1,)}
    """
    return next((config[name] for name in _PAPERS_PANELS if name in config), config)


def setting(config: Mapping[str, Any]) -> dict[str, str]:
    """Returns a figure's configuration in words, by what they are about.

    Args:
      config: of a preset, as a summary holds it; that of its runs is in `train` or `start`.

    >>> setting({"max_delay": 64})
    {'sort': 'numeric: thresholds, no training'}
    """
    config = papers_panel(config)
    train = config.get("train", config.get("start"))
    if train is None:
        for field, words in _OWN_WORDS.items():
            if field in config:
                return words(config)
        return {"sort": _NUMERIC}
    facts = FACTS[train["dataset"]]
    images = train["num_train"] or facts.num_train
    blocks = train["model_options"].get("stage_sizes")
    found = {
        "model": train["model"] if blocks is None else f"{train['model']} of {list(blocks)} blocks",
        "width": f"width {train['width']:g}",
        "data": f"{train['dataset']}, {images:,} {'windows' if facts.is_text else 'images'}",
        "epochs": f"{train['epochs']:g} epochs",
        "batch": f"batch {config.get('worker_batch_size', train['worker_batch_size'])} a worker",
        "workers": "" if "train" not in config else f"{train['num_workers']} workers",
        "smoothing": f"label smoothing {train['label_smoothing']:g}",
        "delays": f"delays {_listed(config['delays'])}" if "delays" in config else "",
        "seeds": f"{len(config['seeds'])} seed" + "s" * (len(config["seeds"]) > 1),
    }
    if not train["label_smoothing"]:
        found["smoothing"] = ""
    return {name: text for name, text in found.items() if text}


def distance(ours: Mapping[str, Any], paper: Mapping[str, Any]) -> str:
    """Returns what differs between two configurations, ours first.

    >>> distance({"max_delay": 64}, {"max_delay": 64})
    'none'
    """
    mine, theirs = setting(ours), setting(paper)
    names = [*mine, *(name for name in theirs if name not in mine)]
    changes = [
        f"{mine.get(name, f'no {name}')} for {theirs.get(name, 'none')}"
        for name in names
        if mine.get(name) != theirs.get(name)
    ]
    return "; ".join(changes) or "none"


def in_words(config: Mapping[str, Any]) -> str:
    """Returns a setting as one line."""
    return ", ".join(setting(config).values())


def _of_tracks(config: Mapping[str, Any]) -> dict[str, str]:
    """Of the edge of stability, which no figure of the paper shows."""
    first, second = (tuple(config[name]) for name in ("same_rate_data", "data"))
    return {
        "data": f"{first[0]}, {first[1]:,} images, and {second[0]}, {second[1]:,} images",
        "model": f"tanh networks {list(first[2])} and {list(second[2])}",
        "time": f"time {config['same_rate_time']:g} and {config['time']:g}",
        "delays": f"delays {_listed(config['rescaled_delays'])}",
        "seeds": f"{len(config['seeds'])} seeds",
    }


def _of_minimum(config: Mapping[str, Any]) -> dict[str, str]:
    """Of thresholds that are computed, and measured at a minimum of an MLP on digits."""
    return {
        "delays": f"delays {_listed(config['delays'])}",
        "measured": f"{len(config['measured'])} methods measured at delays "
        f"{_listed(config['measured_delays'])}",
        "data": f"digits, {config['num_train']:,} images, full batch",
    }


def _of_stages(config: Mapping[str, Any]) -> dict[str, str]:
    """Of edges under delays by layer."""
    return {
        "model": f"tanh networks of {_listed(config['num_layers'])} layers, width "
        f"{config['hidden']}",
        "stages": f"{_listed(config['layers_per_stage'])} layers a stage",
        "data": f"digits, {config['num_train']:,} images, full batch",
        "seeds": f"{len(config['seeds'])} seeds",
    }


def _of_noise(config: Mapping[str, Any]) -> dict[str, str]:
    """Of mean-square edges at minima."""
    return {
        "data": " and ".join(config["measured_on"]),
        "digits": f"{config['num_train']:,} images of digits",
        "pairs": f"{config['num_pairs']} eigenvectors",
        "workers": f"{_listed(config['num_workers'])} workers",
        "batch": f"batches of {_listed(config['batch_sizes'])}",
        "seeds": f"{len(config['seeds'])} seeds of digits",
    }


def _of_adam(config: Mapping[str, Any]) -> dict[str, str]:
    """Of delayed Adam at its edge."""
    return {
        "model": f"tanh networks of {_listed(config['num_layers'])} "
        f"layers, width {config['hidden'][0]}",
        "data": f"digits, {config['num_train']:,} images, full batch",
        "delays": f"delays {_listed(config['uniform_delays'])} and a stage a layer",
        "updates": f"{config['num_steps']:,} updates",
        "seeds": f"{len(config['seeds'])} seeds",
    }


def _of_real_workers(config: Mapping[str, Any]) -> dict[str, str]:
    """Of workers that are processes, on digits and MNIST."""
    epochs = config["mnist_epochs"]
    return {
        "digits": f"digits, {config['digits_epochs']} epochs",
        "mnist": f"MNIST, {config['mnist_samples']:,} images, {epochs} epochs",
        "model": f"LeNet at width {config['width']:g}",
        "times": f"a gradient takes {config['seconds']:g} s",
        "straggler": f"one worker {config['straggler_factor']:g} times as slow",
        "limit": f"staleness up to {config['max_staleness']}",
    }


def _listed(values: Any) -> str:
    return ", ".join(str(value) for value in values)


# By a field that no other figure's configuration has.
_OWN_WORDS: dict[str, Callable[[Mapping[str, Any]], dict[str, str]]] = {
    "measured_delays": _of_minimum,
    "layers_per_stage": _of_stages,
    "measured_on": _of_noise,
    "uniform_delays": _of_adam,
    "same_rate_data": _of_tracks,
    "straggler_factor": _of_real_workers,
}
