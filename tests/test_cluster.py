"""The cluster templates: what Ray's own schema says of cluster.yaml and lets through; KubeRay and SLURM by hand."""

import copy
import re
import subprocess
from pathlib import Path

import jsonschema
import pytest
import ray
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from s3_server import KEYS, s3_server

from core.files.places import upload_file
from distributed.run.working_copy import place_of_run
from distributed.sweeps.nested import is_run

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
    with pytest.raises(jsonschema.ValidationError, match="'max_wokers' was unexpected"):
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


# --- KubeRay and SLURM -------------------------------------------------------------------------------------------

CLUSTERS = ROOT / "distributed" / "clusters"
# Fields of the custom resources as of KubeRay 1.6 (ray.io/v1 API reference); the operator prunes unknown ones silently.
JOB_FIELDS = {
    "activeDeadlineSeconds", "backoffLimit", "rayClusterSpec", "submitterPodTemplate", "metadata", "clusterSelector",
    "submitterConfig", "managedBy", "deletionStrategy", "entrypoint", "runtimeEnvYAML", "jobId", "submissionMode",
    "entrypointResources", "entrypointNumCpus", "entrypointNumGpus", "ttlSecondsAfterFinished",
    "shutdownAfterJobFinishes", "suspend",
}  # fmt: skip
CLUSTER_FIELDS = {
    "headGroupSpec", "workerGroupSpecs", "rayVersion", "enableInTreeAutoscaling", "autoscalerOptions", "suspend",
    "headServiceAnnotations", "authOptions", "managedBy", "gcsFaultToleranceOptions", "upgradeStrategy",
}  # fmt: skip
HEAD_FIELDS = {
    "serviceType",
    "headService",
    "enableIngress",
    "rayStartParams",
    "template",
    "resources",
    "labels",
}
WORKER_FIELDS = {
    "groupName", "replicas", "minReplicas", "maxReplicas", "numOfHosts", "rayStartParams", "template", "scaleStrategy",
    "idleTimeoutSeconds", "suspend", "resources", "labels",
}  # fmt: skip


@pytest.fixture
def kubernetes():
    """(RayJob, NetworkPolicy)"""
    return list(yaml.safe_load_all((CLUSTERS / "kuberay-rayjob.yaml").read_text()))


def problems_of_fields(job):
    cluster = job["spec"]["rayClusterSpec"]
    levels = [(job["spec"], JOB_FIELDS), (cluster, CLUSTER_FIELDS), (cluster["headGroupSpec"], HEAD_FIELDS)]
    levels += [(group, WORKER_FIELDS) for group in cluster["workerGroupSpecs"]]
    for level, known in levels:
        if unknown := level.keys() - known:
            yield f"unknown fields {sorted(unknown)}"
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        if not all(isinstance(value, str) for value in group["rayStartParams"].values()):
            yield "rayStartParams must be text"


def problems_of_pods(job):
    cluster = job["spec"]["rayClusterSpec"]
    head, groups = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    for group in (head, *groups):
        pod = group["template"]["spec"]
        [container] = pod["containers"]
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        claims = {volume["name"] for volume in pod["volumes"] if "persistentVolumeClaim" in volume}
        if not claims & mounted:
            yield "a pod without the shared volume"
        if mounted - {volume["name"] for volume in pod["volumes"]}:
            yield "a mount without its volume"
        if container["resources"]["requests"] != container["resources"]["limits"]:
            yield "requests and limits differ: Ray would plan with what the pod may not use"
        if container["image"] != head["template"]["spec"]["containers"][0]["image"]:
            yield "head and workers of different images"
    if "nvidia.com/gpu" in str(head["template"]) or head["rayStartParams"].get("num-cpus") != "0":
        yield "slots could run on the head"
    for group in groups:
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        if limits.get("nvidia.com/gpu") is None:
            yield "workers without a GPU"
        if group["rayStartParams"]["num-cpus"] != limits["cpu"]:
            yield "Ray is told of other CPUs than the pod has"
        if not group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]:
            yield "replicas outside their bounds"


def problems_of_kuberay(documents):
    job, policy = documents
    spec, cluster = job["spec"], job["spec"]["rayClusterSpec"]
    yield from problems_of_fields(job)
    yield from problems_of_pods(job)
    if not spec.get("shutdownAfterJobFinishes"):
        yield "the cluster would outlive its job"
    if cluster["rayVersion"] != ray.__version__:
        yield "another Ray than the pinned one"
    auth = cluster.get("authOptions", {})
    if auth.get("mode") != "token" or not auth.get("secretName"):
        yield "no token authentication"
    if cluster["headGroupSpec"].get("serviceType") != "ClusterIP" or cluster["headGroupSpec"].get(
        "enableIngress"
    ):
        yield "the head can be reached from outside the cluster"
    if policy["kind"] != "NetworkPolicy" or policy["spec"]["policyTypes"] != ["Ingress"]:
        yield "no NetworkPolicy"
    if any("from" not in rule for rule in policy["spec"]["ingress"]):
        yield "a rule that lets everybody in"
    if "stringData" in str(documents) or re.search(r"auth_token.{0,20}[0-9a-f]{16}", str(documents)):
        yield "a secret in the template"
    timeout = yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"]["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"]
    if int(timeout) < 600:
        yield "Train would give up before a node is up"


def test_nothing_to_complain_about_the_rayjob(kubernetes):
    assert list(problems_of_kuberay(kubernetes)) == []


HEAD_GROUP = (0, "spec", "rayClusterSpec", "headGroupSpec")
WORKERS = (0, "spec", "rayClusterSpec", "workerGroupSpecs", 0)
RAYJOB_MISTAKES = {
    "unknown fields": put((0, "spec", "shutDownAfterJobFinishes"), True),
    "must be text": put((*HEAD_GROUP, "rayStartParams", "num-cpus"), 0),
    "outlive its job": put((0, "spec", "shutdownAfterJobFinishes"), False),
    "another Ray": put((0, "spec", "rayClusterSpec", "rayVersion"), "2.9.0"),
    "no token": put((0, "spec", "rayClusterSpec", "authOptions"), {"mode": "disabled"}),
    "from outside": put((*HEAD_GROUP, "serviceType"), "LoadBalancer"),
    "lets everybody in": put((1, "spec", "ingress"), [{"ports": [{"port": 8265}]}]),
    "without the shared volume": put((*WORKERS, "template", "spec", "volumes"), [{"name": "memory"}]),
    "without its volume": put((*WORKERS, "template", "spec", "volumes"), [{"name": "memory"}]),
    "limits differ": put(
        (*WORKERS, "template", "spec", "containers", 0, "resources", "requests"), {"cpu": "1"}
    ),
    "different images": put((*WORKERS, "template", "spec", "containers", 0, "image"), "other:1"),
    "on the head": put((*HEAD_GROUP, "rayStartParams", "num-cpus"), "4"),
    "other CPUs": put((*WORKERS, "rayStartParams", "num-cpus"), "16"),
    "outside their bounds": put((*WORKERS, "replicas"), 9),
}


@pytest.mark.parametrize("complaint", RAYJOB_MISTAKES)
def test_every_mistake_in_a_rayjob_is_found(kubernetes, complaint):
    changed = copy.deepcopy(kubernetes)  # apart from each other, where YAML had them share
    RAYJOB_MISTAKES[complaint](changed)
    found = list(problems_of_kuberay(changed))
    assert any(complaint in problem for problem in found), found


def test_a_rayjob_begins_and_continues_with_the_same_script_as_slurm(kubernetes):
    script = "distributed/clusters/sweep_or_resume.sh"
    assert script in kubernetes[0]["spec"]["entrypoint"]
    assert script in (CLUSTERS / "slurm.sbatch").read_text()
    assert (ROOT / script).stat().st_mode & 0o111


def test_the_script_begins_or_continues(tmp_path):
    command = tmp_path / "brainsweep"
    command.write_text('#!/bin/sh\nprintf "%s|" "$@"\n')
    command.chmod(0o755)
    run = tmp_path / "a run"
    said = subprocess.run(
        ["sh", CLUSTERS / "sweep_or_resume.sh", run, "a cohort", "--trials", "3"],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, capture_output=True, text=True, check=True,
    ).stdout.split("|")[:-1]  # fmt: skip
    assert said == ["sweep", "a cohort", "--trials", "3", "--out", str(run), "--address", "auto", "--resume"]


@pytest.mark.parametrize("there", [False, True])
def test_a_run_at_an_address_is_found(tmp_path, monkeypatch, there):
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    with s3_server("brains") as options:
        run = f"s3://brains/runs/demo?{options}"
        if there:
            (tmp_path / "run.json").write_text("{}")
            upload_file(tmp_path / "run.json", run, "run.json")
        assert is_run(place_of_run(run)) == there


def test_the_slurm_job_has_a_token_of_its_own_and_a_local_dashboard():
    text = (CLUSTERS / "slurm.sbatch").read_text()
    assert subprocess.run(["bash", "-n", CLUSTERS / "slurm.sbatch"], check=False).returncode == 0
    lines = [line.split("#")[0] for line in text.splitlines() if not line.lstrip().startswith("#")]
    code = "\n".join(lines)
    assert (
        code.index("umask 077")
        < code.index("token_hex")
        < code.index("RAY_AUTH_MODE=token")
        < code.index("ray start")
    )
    assert "--dashboard-host=127.0.0.1" in code
    assert "ray stop" not in code  # it would end the Ray of other jobs on the node
    assert re.search(r"#SBATCH --signal=B:USR1@(\d+)", text)
