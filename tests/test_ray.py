"""Ray: the same calls on a cluster of two nodes, one of which is killed in the middle."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch import nn

from lilliput.search import ask
from lilliput.search.hire import hire

PROGRAM = """
import json, os, sys, time
import ray
from ray.cluster_utils import Cluster

how, port = sys.argv[1], int(sys.argv[2])
server = {"ray_client_server_port": port} if how == "client" else {}
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False, **server})
os.environ["RAY_ADDRESS"] = cluster.address
second = cluster.add_node(num_cpus=1)
from lilliput.search.ray_pool import RayPool
from lilliput.search.pool import WorkerDied

def where(desk, x):
    time.sleep(0.2)
    return desk.thing["a"] + x, desk.get("t"), ray.get_runtime_context().get_node_id()

def patient(desk, smaller=0):
    steps = 0
    while not desk.stopped:
        steps += 1
        desk.report(steps)
        time.sleep(0.01)
    return steps, ray.get_runtime_context().get_node_id()

def deadly(desk, limit, smaller=0):
    if not smaller or limit:
        os._exit(1)
    return "smaller"

def wrong(desk):
    raise KeyError("name")

said = {}
with RayPool("ray://auto" if how == "auto" else f"ray://127.0.0.1:{port}") as pool:
    said["workers"] = pool.workers
    pool.share({"a": 100})
    pool.put("t", [1, 2])
    results = list(pool.map(where, range(8)))
    said["values"], said["table"] = [r[0] for r in results], results[0][1]
    said["nodes"] = len({r[2] for r in results})
    try:
        pool.submit(wrong).result()
    except KeyError as error:
        said["error"] = str(error)
    said["smaller"] = pool.submit(deadly, False).result()
    try:
        pool.submit(deadly, True).result()
    except WorkerDied as error:
        said["died"] = str(error)
    running = [pool.submit(patient) for _ in range(2)]
    while not all(pool.progress(each).steps > 2 for each in running):
        time.sleep(0.1)
    cluster.remove_node(second, allow_graceful=False)
    later = pool.submit(where, 5)
    time.sleep(1)
    for each in running:
        pool.end(each)
    ends = [each.result() for each in running]
    said["ended"], said["left"] = [steps >= 0 for steps, _ in ends], len({node for _, node in ends})
    said["later"] = later.result()[0]
print("SAID" + json.dumps(said))
cluster.shutdown()
"""


SEARCH = """
import os, threading, time
from ray.cluster_utils import Cluster

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
os.environ["RAY_ADDRESS"] = cluster.address
second = cluster.add_node(num_cpus=1)
import torch
from torch import nn
import lilliput

torch.manual_seed(0)
x = torch.randn(240, 8)
model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 3)).eval()
y = model(x).argmax(1)
task = lilliput.Task("toy", (x[:128], y[:128]), (x[128:192], y[128:192]), (x[192:], y[192:]))
results = [
    lilliput.shrink(model, task, floor="20%", trials=2, out=out, workers=workers)
    for out, workers in (("one", 1), ("cluster", "ray://auto"))
]
print("SAID", *(result.chosen["packed_bytes"] for result in results))
cluster.shutdown()
"""


CLUSTER = pytest.mark.skipif(
    os.environ.get("LILLIPUT_TEST_RAY") != "1",
    reason="starts a cluster of two nodes, for minutes, with nothing beside it: LILLIPUT_TEST_RAY=1",
)


def run(program: str, *arguments: str, folder: Path) -> str:
    """What a program says behind SAID."""
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        text=True,
        capture_output=True,
        timeout=420,
        cwd=folder,
        env=os.environ | {"RAY_USAGE_STATS_ENABLED": "0", "RAY_raylet_start_wait_time_s": "120"},
    )
    assert "SAID" in done.stdout, done.stdout + done.stderr
    return done.stdout.partition("SAID")[2].splitlines()[0]


@pytest.mark.slow
@CLUSTER
def test_a_search_by_trials_finds_the_same_on_a_cluster(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    alone, together = run(SEARCH, folder=tmp_path).split()
    assert alone == together
    assert (tmp_path / "one" / "model.lil").read_bytes() == (tmp_path / "cluster" / "model.lil").read_bytes()


@pytest.mark.slow
@CLUSTER
@pytest.mark.parametrize("how", ["auto", "client"])
def test_two_nodes_and_one_killed(how: str, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    said = json.loads(run(PROGRAM, how, str(20000 + os.getpid() % 10000), folder=tmp_path))
    assert "died 4 times" in said.pop("died")
    assert said == {
        "workers": 2,
        "values": list(range(100, 108)),
        "table": [1, 2],
        "nodes": 2,
        "error": "'name'",
        "smaller": "smaller",
        "ended": [True, True],
        "left": 1,
        "later": 105,
    }


def test_what_is_asked_for() -> None:
    for text, expected in (("3", 3), (2, 2), (None, None), ("ray://10.0.0.1:10001", "ray://10.0.0.1:10001")):
        assert ask.workers(text) == expected
    for wrong in ("ray://", "many", "-1", "http://host", "0", 0, "1.5"):
        with pytest.raises(ValueError, match="must be a number of processes, at least 1, or ray://HOST"):
            ask.workers(wrong)


def test_ray_is_asked_for_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"workers='ray://head' needs .*'ray'.* Run: pip install 'lilliput\[ray\]'"):
        hire(nn.Linear(2, 2), "ray://head")
