"""metrics.json of a run that is resumed has every iteration once."""

import json

import pytest

from sasa_det.engine.writers import rewind_metrics


@pytest.mark.parametrize("metrics", [{}, {"bbox/AP": 3.0}])
@pytest.mark.parametrize(
    "iterations", [[19, 39], [19, 39, 29], [19, 39, 29, 39], [19, 29, 49, 39, 59], [19]]
)
def test_every_iteration_is_there_once(tmp_path, iterations, metrics):
    path = tmp_path / "metrics.json"
    records = [{"iteration": x, f"loss{i}": i} for i, x in enumerate(iterations)]
    path.write_text("".join(f"{json.dumps(x)}\n" for x in records) + '{"iteration": 39, "lo')
    rewind_metrics(path, 39, metrics)
    expected = {}
    for record in records:
        if record["iteration"] <= 39:
            expected.setdefault(record["iteration"], {}).update(record)
    if metrics:
        expected.setdefault(39, {"iteration": 39}).update(metrics)
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert {x["iteration"]: x for x in found} == expected
    assert len(found) == len(expected)
