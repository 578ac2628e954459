"""The profile of a pipeline, against a simulation of its clock; leaves and their stages."""

import pytest

from asgd_jax import delays


def one_forward_one_backward(num_stages, num_batches=40):
    """The steady staleness of each stage: updates of its weights between forward and backward.

    Every stage does one pass a tick, a backward pass where one is ready, else a forward one of the
    next micro-batch, of which num_stages - stage may be under way there.
    """
    arrived = [list(range(num_batches))] + [[] for _ in range(num_stages - 1)]
    returned = [[] for _ in range(num_stages)]
    version, seen = [0] * num_stages, [{} for _ in range(num_stages)]
    ages = [[] for _ in range(num_stages)]
    under_way = [0] * num_stages
    for _ in range(6 * num_batches):
        forward, backward = [], []
        for stage in range(num_stages):
            if returned[stage]:
                batch = returned[stage].pop(0)
                ages[stage].append(version[stage] - seen[stage].pop(batch))
                version[stage] += 1
                under_way[stage] -= 1
                backward.append((stage, batch))
            elif arrived[stage] and under_way[stage] < num_stages - stage:
                batch = arrived[stage].pop(0)
                seen[stage][batch] = version[stage]
                under_way[stage] += 1
                forward.append((stage, batch))
        for stage, batch in forward:
            (arrived[stage + 1] if stage + 1 < num_stages else returned[stage]).append(batch)
        for stage, batch in backward:
            if stage:
                returned[stage - 1].append(batch)
    return [set(age[2 * num_stages : -2 * num_stages]) for age in ages]


@pytest.mark.parametrize("num_stages", [1, 2, 3, 5, 8])
def test_one_forward_one_backward_is_what_its_clock_gives(num_stages):
    expected = [{age} for age in delays.pipeline(num_stages)]
    assert one_forward_one_backward(num_stages) == expected


def test_stages_without_a_profile_are_themselves():
    params = {"a": 0.0, "b": [0.0, 0.0]}
    assign = {"a": 0, "b": 1}
    assert delays.by_stage(params, lambda path: assign[path[0].key]) == {"a": 0, "b": [1, 1]}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: delays.pipeline(0), r"num_stages must be >= 1"),
        (lambda: delays.pipeline(2.5), r"num_stages must be an integer >= 0, got 2.5"),
        (lambda: delays.pipeline(2, "gpipe"), r"unknown schedule 'gpipe': use one of 1f1b"),
        (lambda: delays.by_stage({"a": 0.0}, lambda path: -1), r"params\['a'\] must be .* got -1"),
        (
            lambda: delays.by_stage({"a": 0.0}, lambda path: 3, (1, 0)),
            r"the stage of params\['a'\] is 3, and the profile has 2 stages",
        ),
    ],
)
def test_bad_input_is_one_line(call, message):
    with pytest.raises(ValueError, match=message):
        call()
