"""cluster.yaml: what Ray's own schema says of it, and what that schema lets through."""

import copy
import re
from pathlib import Path

import jsonschema
import pytest
import ray
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[1]

# vCPUs and GPUs from Amazon's tables: nothing offline can tell a misspelt instance type.
INSTANCES = {
    "m7i.xlarge": (4, 0), "m7i.2xlarge": (8, 0), "m7i.4xlarge": (16, 0), "r7i.2xlarge": (8, 0),
    "g5.xlarge": (4, 1), "g5.2xlarge": (8, 1), "g5.12xlarge": (48, 4), "g6.xlarge": (4, 1),
    "g6.2xlarge": (8, 1), "g6.12xlarge": (48, 4), "p4d.24xlarge": (96, 8), "p5.48xlarge": (192, 8),
}  # fmt: skip


@pytest.fixture
def cluster():
    return yaml.safe_load((ROOT / "cluster.yaml").read_text())


def commands(cluster):
    lists = (value for key, value in cluster.items() if key.endswith("_commands"))
    return [line for lines in lists for line in lines]


def starts(cluster, role):
    """The commands by which nodes of a role start Ray."""
    return [line for line in cluster[f"{role}_start_ray_commands"] if "ray start" in line]


def problems_of_nodes(cluster):
    types = cluster["available_node_types"]
    for name, kind in types.items():
        resources, instance = kind["resources"], kind["node_config"].get("InstanceType")
        if wrong := [key for key in resources if key != key.upper()]:
            yield f"{name}: resource {wrong} in lower case"
        if kind.get("max_workers", 0) > cluster["max_workers"]:
            yield f"{name}: more workers than the cluster may have"
        if instance not in INSTANCES:
            yield f"{name}: unknown instance type {instance}"
        elif (resources.get("CPU"), resources.get("GPU", 0)) != INSTANCES[instance]:
            yield f"{name}: resources are not those of {instance}"
    head = types[cluster["head_node_type"]]
    if head["resources"].get("GPU") or head.get("max_workers") != 0:
        yield "the head must be a single CPU node"
    markets = {
        kind["node_config"].get("InstanceMarketOptions", {}).get("MarketType", "on-demand")
        for kind in types.values()
        if kind["resources"].get("GPU") and kind.get("max_workers", 0) > 0
    }
    if markets != {"spot", "on-demand"}:
        yield f"GPU workers must come from both markets, not {markets}"


def problems_of_security(cluster):
    for role in ("head", "worker"):
        if not all("RAY_AUTH_MODE=token" in line for line in starts(cluster, role)):
            yield f"{role} starts without token authentication"
    if not any(path.endswith("/.ray/auth_token") for path in cluster["file_mounts"]):
        yield "nodes do not get the token"
    if not all("--dashboard-host=127.0.0.1" in line for line in starts(cluster, "head")):
        yield "dashboard not on localhost"
    if re.search(r"0\.0\.0\.0|::/0", yaml.safe_dump(cluster)):
        yield "a port open to the world"


def problems_of_setup(cluster):
    installs = [line for line in commands(cluster) if "pip install" in line]
    if not installs or not all("--constraint ~/brainsweep/constraints.txt" in line for line in installs):
        yield "pip without the pinned constraints"
    if "mountpoint -q /shared" not in cluster["setup_commands"]:
        yield "a node without the shared storage could join"
    timeouts = [re.search(r"WORKER_GROUP_START_TIMEOUT_S=(\d+)", line) for line in starts(cluster, "head")]
    if not all(found and int(found[1]) >= 600 for found in timeouts):
        yield "Train would give up before a node is up"
    if missing := {".git", ".venv", "*.h5", "cohorts", "runs"} - set(cluster["rsync_exclude"]):
        yield f"copied to every node: {missing}"


def problems(cluster):
    found = [*problems_of_nodes(cluster), *problems_of_security(cluster), *problems_of_setup(cluster)]
    if not starts(cluster, "head") or not starts(cluster, "worker"):
        found.append("a role does not start Ray")
    return found


def test_ray_accepts_it(cluster):
    prepared = prepare_config(copy.deepcopy(cluster))
    validate_config(prepared)
    assert prepared["available_node_types"]["gpu_spot"]["max_workers"] == 8
    with pytest.raises(jsonschema.ValidationError):
        validate_config(prepare_config(cluster | {"max_wokers": 3}))


def test_nothing_to_complain_about(cluster):
    assert problems(cluster) == []


def put(path, value):
    def change(cluster):
        *parents, last = path
        for key in parents:
            cluster = cluster[key]
        cluster[last] = value

    return change


def rewrite(section, old, new):
    def change(cluster):
        before = list(cluster[section])
        cluster[section] = [line.replace(old, new) for line in before]
        assert cluster[section] != before

    return change


SPOT, HEAD = ("available_node_types", "gpu_spot"), ("available_node_types", "head")
OPEN = [{"FromPort": 8265, "ToPort": 8265, "IpProtocol": "tcp", "IpRanges": [{"CidrIp": "0.0.0.0/0"}]}]
MISTAKES = {
    "lower case": put((*SPOT, "resources"), {"CPU": 8, "gpu": 1}),
    "more workers than": put((*SPOT, "max_workers"), 9),
    "unknown instance type": put((*SPOT, "node_config", "InstanceType"), "g6.2xlrage"),
    "resources are not those of": put((*SPOT, "resources", "GPU"), 4),
    "single CPU node": put((*HEAD, "max_workers"), 1),
    "both markets": put((*SPOT, "node_config", "InstanceMarketOptions"), {}),
    "head starts without token": rewrite("head_start_ray_commands", "RAY_AUTH_MODE=token", ""),
    "worker starts without token": rewrite("worker_start_ray_commands", "=token", "=disabled"),
    "do not get the token": put(("file_mounts",), {"/home/ubuntu/brainsweep": "."}),
    "dashboard not on localhost": rewrite("head_start_ray_commands", "127.0.0.1", "10.0.0.1"),
    "open to the world": put(("provider", "security_group", "IpPermissions"), OPEN),
    "without the pinned": rewrite("setup_commands", "--constraint ~/brainsweep/constraints.txt", ""),
    "without the shared storage": put(("setup_commands",), ["pip install --constraint ~/brainsweep/constraints.txt"]),
    "Train would give up": rewrite("head_start_ray_commands", "TIMEOUT_S=900", "TIMEOUT_S=60"),
    "copied to every node": put(("rsync_exclude",), [".git"]),
    "does not start Ray": put(("worker_start_ray_commands",), ["ray stop"]),
}  # fmt: skip


@pytest.mark.parametrize("complaint", MISTAKES)
def test_every_mistake_is_found_though_ray_accepts_it(cluster, complaint):
    MISTAKES[complaint](cluster)
    validate_config(prepare_config(copy.deepcopy(cluster)))
    assert any(complaint in problem for problem in problems(cluster)), problems(cluster)


def test_the_pinned_ray_is_the_one_whose_schema_was_asked():
    assert f"ray=={ray.__version__}" in (ROOT / "constraints.txt").read_text().splitlines()


def test_what_is_mounted_from_here_exists(cluster):
    local = [path for path in cluster["file_mounts"].values() if not path.startswith("~")]
    assert local == ["."]
    assert (ROOT / "constraints.txt").exists()
