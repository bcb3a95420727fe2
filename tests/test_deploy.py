"""What a cluster user applies is checked as strictly as code: every field, every path, every version."""

from __future__ import annotations

import copy
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from pipeline.machine import load_machine

ROOT = Path(__file__).parents[1]
RAYJOB = yaml.safe_load((ROOT / "deploy/kuberay/rayjob.yaml").read_text())
POLICY = yaml.safe_load((ROOT / "deploy/kuberay/networkpolicy.yaml").read_text())
LAUNCHER = yaml.safe_load((ROOT / "deploy/ray/cluster.yaml").read_text())
SBATCH = (ROOT / "deploy/slurm/pairsieve.sbatch").read_text()
DOCKERFILE = (ROOT / "deploy/Dockerfile").read_text()


def fields(required: dict[str, Any], optional: dict[str, Any] | None = None) -> dict[str, Any]:
    """Schema of an object with these fields and no others."""
    return {
        "type": "object",
        "properties": required | (optional or {}),
        "required": list(required),
        "additionalProperties": False,
    }


NAME = {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"}
COUNT = {"type": "integer", "minimum": 0}
LABELS = {"type": "object", "additionalProperties": {"type": "string"}}
QUANTITIES = fields(
    {"cpu": {"type": "string"}, "memory": {"type": "string", "pattern": "^[0-9]+Gi$"}},
    {"nvidia.com/gpu": {"type": "string"}, "ephemeral-storage": {"type": "string", "pattern": "^[0-9]+Gi$"}},
)
CONTAINER = fields(
    {
        "name": NAME,
        "image": {"type": "string", "pattern": "^[^:]+:[^:]+$", "not": {"pattern": ":latest$"}},
        "env": {"type": "array", "items": fields({"name": {"type": "string"}, "value": {"type": "string"}})},
        "resources": fields({"requests": QUANTITIES, "limits": QUANTITIES}),
    },
    {
        "envFrom": {
            "type": "array",
            "items": fields({"secretRef": fields({"name": NAME}, {"optional": {"const": True}})}),
        }
    },
)
POD = fields(
    {
        "metadata": fields({"labels": LABELS}),
        "spec": fields(
            {"containers": {"type": "array", "items": CONTAINER, "minItems": 1, "maxItems": 1}},
            {
                "tolerations": {
                    "type": "array",
                    "items": fields(
                        {
                            "key": {"type": "string"},
                            "operator": {"enum": ["Exists", "Equal"]},
                            "effect": {"enum": ["NoSchedule", "PreferNoSchedule", "NoExecute"]},
                        }
                    ),
                }
            },
        ),
    }
)
START_PARAMS = {"type": "object", "additionalProperties": {"type": "string"}}
RAYJOB_SCHEMA = fields(
    {
        "apiVersion": {"const": "ray.io/v1"},
        "kind": {"const": "RayJob"},
        "metadata": fields({"name": NAME}),
        "spec": fields(
            {
                "entrypoint": {"type": "string"},
                "submissionMode": {"enum": ["K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode"]},
                "backoffLimit": COUNT | {"minimum": 1},
                "activeDeadlineSeconds": COUNT | {"minimum": 1},
                "shutdownAfterJobFinishes": {"const": True},
                "ttlSecondsAfterFinished": COUNT,
                "rayClusterSpec": fields(
                    {
                        "rayVersion": {"type": "string", "pattern": r"^\d+\.\d+\.\d+$"},
                        "authOptions": fields({"mode": {"const": "token"}, "secretName": NAME}),
                        "headGroupSpec": fields({"rayStartParams": START_PARAMS, "template": POD}),
                        "workerGroupSpecs": {
                            "type": "array",
                            "items": fields(
                                {
                                    "groupName": NAME,
                                    "replicas": COUNT,
                                    "minReplicas": COUNT,
                                    "maxReplicas": COUNT,
                                    "rayStartParams": START_PARAMS,
                                    "template": POD,
                                }
                            ),
                        },
                    }
                ),
            }
        ),
    }
)


def groups(job: dict[str, Any]) -> dict[str, dict[str, Any]]:
    cluster = job["spec"]["rayClusterSpec"]
    return {"head": cluster["headGroupSpec"]} | {group["groupName"]: group for group in cluster["workerGroupSpecs"]}


def container(group: dict[str, Any]) -> Any:
    return group["template"]["spec"]["containers"][0]


@pytest.mark.goal("S-f")
def test_the_rayjob_has_only_fields_that_kuberay_knows() -> None:
    assert list(jsonschema.Draft202012Validator(RAYJOB_SCHEMA).iter_errors(RAYJOB)) == []


@pytest.mark.goal("S-f")
@pytest.mark.parametrize(
    "mutate",
    [
        lambda job: job["spec"].update(entryPoint=job["spec"].pop("entrypoint")),
        lambda job: job["spec"].pop("backoffLimit"),
        lambda job: job["spec"].update(activeDeadlineSeconds="604800"),
        lambda job: job["spec"].update(shutdownAfterJobFinishes=False),
        lambda job: job["spec"]["rayClusterSpec"].pop("authOptions"),
        lambda job: job["spec"]["rayClusterSpec"]["authOptions"].update(mode="disabled"),
        lambda job: groups(job)["cpu"].update(minReplicas="8"),
        lambda job: groups(job)["head"]["rayStartParams"].update({"num-cpus": 0}),
        lambda job: container(groups(job)["gpu"]).update(image="pairsieve:latest"),
        lambda job: container(groups(job)["gpu"]).update(resource={}),
    ],
)
def test_a_misspelled_missing_or_wrong_field_of_the_rayjob_is_caught(mutate: Callable[[dict[str, Any]], None]) -> None:
    job = copy.deepcopy(RAYJOB)
    mutate(job)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(job, RAYJOB_SCHEMA)


def test_the_rayjob_keeps_work_off_the_head_and_gives_gpus_to_the_gpu_group_alone() -> None:
    assert groups(RAYJOB)["head"]["rayStartParams"]["num-cpus"] == "0"
    for name, group in groups(RAYJOB).items():
        resources = container(group)["resources"]
        assert resources["requests"] == resources["limits"]
        assert ("nvidia.com/gpu" in resources["limits"]) == (name == "gpu")


def test_the_machine_file_asks_for_the_gpus_that_the_clusters_offer() -> None:
    asked = load_machine(str(ROOT / "conf/machines/cluster.yaml")).gpus
    assert asked == groups(RAYJOB)["gpu"]["replicas"] == LAUNCHER["available_node_types"]["gpu"]["max_workers"]


@pytest.mark.goal("S-f")
def test_the_network_policy_covers_every_pod_of_the_rayjob() -> None:
    assert POLICY["kind"] == "NetworkPolicy" and POLICY["spec"]["policyTypes"] == ["Ingress"]
    selected = POLICY["spec"]["podSelector"]["matchLabels"]
    for group in groups(RAYJOB).values():
        assert selected.items() <= group["template"]["metadata"]["labels"].items()
    for rule in POLICY["spec"]["ingress"]:
        assert rule["from"] == [{"podSelector": {"matchLabels": selected}}] or rule["ports"] == [
            {"protocol": "TCP", "port": 8265}
        ]


def launcher_schema() -> Any:
    from importlib.util import find_spec

    spec = find_spec("ray")
    assert spec and spec.origin
    return json.loads((Path(spec.origin).parent / "autoscaler/ray-schema.json").read_text())


@pytest.mark.goal("S-f")
def test_the_launcher_file_passes_rays_own_schema(record_property: pytest.RecordProperty) -> None:
    jsonschema.validate(LAUNCHER, launcher_schema())
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(LAUNCHER | {"setup_command": []}, launcher_schema())
    record_property("figure", "RayJob, NetworkPolicy, Ray launcher: valid; 11 of 11 wrong fields caught")


def test_the_launcher_runs_gpus_on_spot_nodes_and_nothing_on_the_head() -> None:
    types = LAUNCHER["available_node_types"]
    assert types[LAUNCHER["head_node_type"]]["resources"] == {"CPU": 0}
    assert types["gpu"]["resources"]["GPU"] == 1
    assert types["gpu"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert sum(kind.get("max_workers", 0) for kind in types.values()) <= LAUNCHER["max_workers"]


def shell_commands(script: str) -> list[list[str]]:
    """The words of each command of a shell script, comments left out."""
    lines = script.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@pytest.mark.goal("S-e")
def test_the_slurm_script_runs_ray_on_all_nodes_with_a_token_that_is_on_no_command_line() -> None:
    commands = shell_commands(SBATCH)
    assert SBATCH.startswith("#!/bin/bash\n")
    assert ["set", "-euo", "pipefail"] in commands
    before, run = commands[:-1], commands[-1]
    assert ["export", "RAY_AUTH_MODE=token"] in before and ["export", "RAY_AUTH_TOKEN"] in before
    assert not any("RAY_AUTH_TOKEN" in word for word in run)
    assert run[0] == "srun" and run[run.index("ray") + 1] == "symmetric-run"
    start, entry = run[: run.index("--")], run[run.index("--") + 1 :]
    assert start[start.index("--min-nodes") + 1] == start[1].removeprefix("--nodes=") == "$SLURM_JOB_NUM_NODES"
    assert not {"--head", "--port", "--block", "--node-ip-address"} & set(start), "symmetric-run refuses these"
    address = start[start.index("--address") + 1]
    assert entry[:2] == ["env", f"RAY_ADDRESS={address}"], "symmetric-run does not tell the driver"
    directives = dict(re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", SBATCH, re.MULTILINE))
    assert directives["ntasks-per-node"] == "1" and "requeue" in directives


ENTRYPOINTS = {
    "rayjob": shlex.split(RAYJOB["spec"]["entrypoint"]),
    "slurm": shell_commands(SBATCH)[-1],
    "launcher": shlex.split(
        re.sub(r"\\?\n# *", " ", (ROOT / "deploy/ray/cluster.yaml").read_text().split("ray job submit")[1])
    ),
}


@pytest.mark.parametrize("name", ENTRYPOINTS)
def test_every_entrypoint_names_files_that_exist(name: str) -> None:
    words = ENTRYPOINTS[name]
    words = words[words.index("python") :]
    assert words[:3] == ["python", "-m", "jobs.curate"]
    assert (ROOT / words[3]).is_file() and words[3].startswith("conf/recipes/")
    assert words[4] == "--run"
    assert words[6] == "--machine" and load_machine(str(ROOT / words[7])).device == "cuda"


def test_every_machine_file_loads() -> None:
    names = {path.stem: load_machine(str(path)) for path in (ROOT / "conf/machines").glob("*.yaml")}
    assert set(names) == {"laptop", "gpu_node", "cluster", "a100_nodes"}
    assert names["laptop"].device == "auto" and names["gpu_node"].gpus is None


def test_one_version_of_ray_that_the_package_allows() -> None:
    images = [container(group)["image"] for group in groups(RAYJOB).values()]
    assert len(set(images)) == 1 and images[0] in DOCKERFILE
    version = RAYJOB["spec"]["rayClusterSpec"]["rayVersion"]
    texts = DOCKERFILE + json.dumps(LAUNCHER)
    assert set(re.findall(r"rayproject/ray:([\d.]+)-|ray\[default\]==([\d.]+)", texts)) == {
        (version, ""),
        ("", version),
    }
    (lowest,) = re.findall(r'"ray\[default\]>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert [int(n) for n in version.split(".")] >= [int(n) for n in lowest.split(".")]


def ray_starts() -> list[str]:
    commands = LAUNCHER["head_start_ray_commands"] + LAUNCHER["worker_start_ray_commands"]
    return [command for command in commands if "ray start" in command]


@pytest.mark.goal("S-e", "S-f")
def test_every_ray_that_is_shipped_wants_a_token() -> None:
    for group in groups(RAYJOB).values():
        assert {"name": "RAY_AUTH_MODE", "value": "token"} in container(group)["env"]
    assert len(ray_starts()) == 2
    assert all("RAY_AUTH_MODE=token" in command for command in ray_starts())
    assert "--env RAY_AUTH_MODE=token" in LAUNCHER["docker"]["run_options"]


@pytest.mark.goal("S-e", "S-b")
def test_no_dashboard_listens_to_every_interface_and_no_token_is_written_down(
    record_property: pytest.RecordProperty,
) -> None:
    shipped = [path for folder in ("deploy", "conf") for path in (ROOT / folder).rglob("*") if path.is_file()]
    assert len(shipped) >= 8
    for path in shipped:
        text = path.read_text()
        assert "0.0.0.0" not in text and "::" not in text, path
        assert "RAY_AUTH_MODE=disabled" not in text, path
        assert not re.search(r"\b[0-9a-f]{32,}\b", text), path
    (head,) = [command for command in ray_starts() if "--head" in command]
    assert "--dashboard-host=127.0.0.1" in head
    record_property("figure", f"{len(shipped)} shipped files: no token, no dashboard on every interface, auth on")


def test_what_is_large_or_private_stays_out_of_a_submitted_job() -> None:
    ignored = set((ROOT / ".rayignore").read_text().split())
    assert {".venv/", ".git/", "/demo/"} <= ignored
