"""The files of deploy/ have the form that Kubernetes, KubeRay and Docker expect, and keep their
promises: no root, no compiler, a token, no key. They were started on no cluster."""

from __future__ import annotations

import copy
import re
import shlex
import tomllib
from pathlib import Path

import jsonschema
import pytest
import yaml

from stego_core.config.load import load_job
from stego_core.config.schema import SegmentJob
from stego_core.distributed.environment import _RAY_SETTINGS

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "deploy" / "rayjob.yaml").read_text()


def fields(required=(), **types):
    """A JSON schema of an object that has these fields and no others."""
    properties = {name: {"type": t} if isinstance(t, str) else t for name, t in types.items()}
    return {
        "type": "object",
        "additionalProperties": False,
        "properties": properties,
        "required": list(required),
    }


def of(kind, *names):
    return dict.fromkeys(names, kind)


COUNT = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}
TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
GROUP = {"rayStartParams": TEXTS, "template": "object", "labels": TEXTS, "resources": TEXTS}
HEAD = fields(
    ["template"],
    serviceType={"enum": ["ClusterIP", "NodePort", "LoadBalancer"]},
    enableIngress="boolean",
    headService="object",
    **GROUP,
)
WORKERS = fields(
    ["groupName", "template"],
    groupName="string",
    suspend="boolean",
    scaleStrategy="object",
    **of(COUNT, "replicas", "minReplicas", "maxReplicas", "numOfHosts", "idleTimeoutSeconds"),
    **GROUP,
)
AUTOSCALER = fields(
    upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]},
    version={"enum": ["v1", "v2"]},
    idleTimeoutSeconds=COUNT,
    **of("string", "image", "imagePullPolicy"),
    **of("array", "env", "envFrom", "volumeMounts"),
    **of("object", "resources", "securityContext"),
)
CLUSTER = fields(
    ["headGroupSpec"],
    headGroupSpec=HEAD,
    workerGroupSpecs={"type": "array", "items": WORKERS},
    autoscalerOptions=AUTOSCALER,
    authOptions=fields(
        mode={"enum": ["disabled", "token"]}, secretName="string", enableK8sTokenAuth="boolean"
    ),
    headServiceAnnotations=TEXTS,
    **of("string", "rayVersion", "managedBy"),
    **of("boolean", "enableInTreeAutoscaling", "suspend"),
    **of("object", "gcsFaultToleranceOptions", "upgradeStrategy"),
)
# The `ray.io/v1` RayJob by the reference and Go types of KubeRay 1.6: fields, types, choices. Pods
# inside it are Kubernetes' own and are checked against its schema.
RAY_JOB = fields(
    rayClusterSpec=CLUSTER,
    submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
    managedBy={"enum": ["ray.io/kuberay-operator", "kueue.x-k8s.io/multikueue"]},
    submitterConfig=fields(backoffLimit=COUNT),
    clusterSelector=TEXTS,
    metadata=TEXTS,
    activeDeadlineSeconds={"type": "integer", "minimum": 1},
    **of(COUNT, "backoffLimit", "preRunningDeadlineSeconds", "ttlSecondsAfterFinished"),
    **of("boolean", "shutdownAfterJobFinishes", "suspend"),
    **of("number", "entrypointNumCpus", "entrypointNumGpus"),
    **of("object", "submitterPodTemplate", "deletionStrategy"),
    **of("string", "entrypoint", "entrypointResources", "jobId", "runtimeEnvYAML"),
)


@pytest.fixture
def documents():
    return list(yaml.safe_load_all(TEXT))


@pytest.fixture
def job(documents):
    return documents[0]


def pods(job):
    cluster = job["spec"]["rayClusterSpec"]
    workers = [(g["groupName"], g["template"]) for g in cluster["workerGroupSpecs"]]
    submitter = ("submitter", job["spec"]["submitterPodTemplate"])
    return dict([submitter, ("head", cluster["headGroupSpec"]["template"]), *workers])


def problems(job):
    """What KubeRay would refuse, as `path: reason`."""
    errors = jsonschema.Draft202012Validator(RAY_JOB).iter_errors(job["spec"])
    return sorted(f"{'.'.join(map(str, e.absolute_path))}: {e.message}" for e in errors)


def validate(document):
    import kubernetes_validate

    version = kubernetes_validate.latest_version()
    kubernetes_validate.validate(document, version, strict=True)


def as_document(template):
    return {
        "apiVersion": "v1",
        "kind": "PodTemplate",
        "metadata": {"name": "x"},
        "template": template,
    }


def test_kuberay_accepts_the_job(job):
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert problems(job) == []


@pytest.mark.parametrize(
    ("place", "value", "reason"),
    [
        ("rayClusterSpec.workerGroupSpecs.0.minReplcias", 1, "unexpected"),
        ("rayClusterSpec.workerGroupSpecs.1.maxReplicas", "4", "not of type 'integer'"),
        ("rayClusterSpec.headGroupSpec.rayStartParams.num-cpus", 0, "not of type 'string'"),
        ("rayClusterSpec.rayVersion", 2.60, "not of type 'string'"),
        ("rayClusterSpec.authOptions.mode", "Token", "not one of"),
        ("rayClusterSpec.autoscalerOptions.upscalingMode", "Fast", "not one of"),
        ("submissionMode", "k8sJobMode", "not one of"),
        ("activeDeadlineSeconds", 0, "less than the minimum"),
        ("entrypoint", ["python", "job.py"], "not of type 'string'"),
    ],
)
def test_damage_to_the_job_is_noticed(place, value, reason, job):
    *path, last = place.split(".")
    part = job["spec"]
    for key in path:
        part = part[int(key) if key.isdigit() else key]
    part[last] = value
    (problem,) = problems(job)
    assert reason in problem


def test_kubernetes_accepts_every_pod_and_the_network_policy(documents):
    policy = documents[1]
    validate(policy)
    for template in pods(documents[0]).values():
        validate(as_document(template))


@pytest.mark.parametrize("damage", ["unknown key", "wrong type"])
def test_kubernetes_schema_notices_damage(damage, job):
    import kubernetes_validate

    template = copy.deepcopy(pods(job)["cpu"])
    if damage == "unknown key":
        template["spec"]["containers"][0]["imagee"] = "x"
    else:
        template["spec"]["containers"][0]["ports"] = "8265"
    with pytest.raises(kubernetes_validate.ValidationError):
        validate(as_document(template))


def test_nobody_is_root_and_nothing_gains_rights(job):
    for name, template in pods(job).items():
        assert template["spec"]["securityContext"]["runAsNonRoot"] is True, name
        assert template["spec"]["securityContext"]["runAsUser"] > 0
        for container in template["spec"]["containers"]:
            rights = container["securityContext"]
            assert rights["allowPrivilegeEscalation"] is False
            assert rights["capabilities"] == {"drop": ["ALL"]}
        if name != "head":  # whose autoscaler starts and ends pods
            assert template["spec"]["automountServiceAccountToken"] is False


def test_every_container_states_its_resources_and_one_version_of_one_image(job):
    images = set()
    for template in pods(job).values():
        for container in template["spec"]["containers"]:
            images.add(container["image"])
            assert container["resources"]["requests"].keys() >= {"cpu", "memory"}
            assert container["resources"]["limits"].keys() >= {"cpu", "memory"}
    (image,) = images
    version = re.search(r'"(.*)"', (ROOT / "stego_core" / "__init__.py").read_text().split("=")[1])
    assert image.rpartition(":")[2] == version[1]
    assert ":latest" not in TEXT


def test_the_token_is_on_and_comes_from_a_secret(job):
    auth = job["spec"]["rayClusterSpec"]["authOptions"]
    assert auth == {"mode": "token", "secretName": "stego-ray-token"}
    assert f"create secret generic {auth['secretName']} --from-literal=auth_token=" in TEXT


def test_the_ports_are_closed_to_all_but_the_job_and_the_operator(documents):
    job, policy = documents
    label = policy["spec"]["podSelector"]["matchLabels"]
    for template in pods(job).values():
        assert template["metadata"]["labels"] == label
    assert policy["spec"]["policyTypes"] == ["Ingress"]
    (rule,) = policy["spec"]["ingress"]
    assert all("podSelector" in peer for peer in rule["from"])
    head = job["spec"]["rayClusterSpec"]["headGroupSpec"]
    assert head["serviceType"] == "ClusterIP"
    assert not head.get("enableIngress")


def test_the_head_runs_no_work_and_gpus_are_spot_and_start_from_none(job):
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    groups = {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
    for group in groups.values():
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    assert groups["gpu"]["minReplicas"] == 0
    assert "spot" in groups["gpu"]["template"]["spec"]["nodeSelector"].values()
    (container,) = groups["gpu"]["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert groups["cpu"]["minReplicas"] == 1
    assert "nodeSelector" not in groups["cpu"]["template"]["spec"]


def test_the_job_is_one_of_ours_and_its_flags_are_known(job):
    python, script, *flags = shlex.split(job["spec"]["entrypoint"])
    assert python == "python"
    assert (ROOT / "jobs" / Path(script).name).is_file()
    assert Path(script).name == "segment_bucket.py"
    parsed = load_job(SegmentJob, [*flags, "--dry-run"], prog="x")
    groups = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert parsed.actors == next(g["replicas"] for g in groups if g["groupName"] == "gpu")


def test_the_version_of_ray_is_the_constrained_one(job):
    constraints = (ROOT / "constraints.txt").read_text()
    assert f"ray=={job['spec']['rayClusterSpec']['rayVersion']}\n" in constraints


def test_five_fields_are_marked_for_editing():
    assert sorted(re.findall(r"# EDIT (\d):", TEXT)) == ["1", "2", "3", "4", "5"]


@pytest.mark.parametrize("name", ["rayjob.yaml", "Dockerfile", "Dockerfile.dockerignore"])
def test_no_key_no_account_and_no_address_is_in_the_files(name):
    text = (ROOT / "deploy" / name).read_text()
    secret = r"A[KS]IA\w{16}|\b\d{12}\b|arn:aws|BEGIN [A-Z ]*KEY|\b\d+\.\d+\.\d+\.\d+\b"
    assert re.findall(secret, text) == []


@pytest.fixture
def dockerfile():
    dockerfile = pytest.importorskip("dockerfile")
    return dockerfile.parse_file(str(ROOT / "deploy" / "Dockerfile"))


def stages(commands):
    found = []
    for command in commands:
        if command.cmd.upper() == "FROM":
            found.append([])
        found[-1].append(command)
    return found


def test_the_image_is_built_in_stages_on_one_pinned_base(dockerfile):
    build, final = stages(dockerfile)
    bases = {stage[0].value[0] for stage in (build, final)}
    (base,) = bases
    name, _, tag = base.partition(":")
    assert name == "python"
    assert re.fullmatch(r"3\.\d+\.\d+-slim-\w+", tag)  # a version of Python and of Debian
    required = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    floor = tuple(map(int, required.removeprefix(">=").split(".")))
    assert tuple(map(int, tag.split("-")[0].split(".")))[:2] >= floor
    # One interpreter for all nodes of either file.
    launcher = (ROOT / "cluster.yaml").read_text()
    assert f"py{''.join(tag.split('.')[:2])}" in launcher


def test_the_compiler_stays_in_the_build_stage(dockerfile):
    build, final = stages(dockerfile)
    text = {
        name: " ".join(c.original for c in stage) for name, stage in (("b", build), ("f", final))
    }
    assert re.search(r"install .*\bg\+\+", text["b"])
    assert not re.search(r"g\+\+|gcc|build-essential|make\b|pip install", text["f"])
    copied = [c for c in final if c.cmd.upper() == "COPY" and "--from=build" in c.flags]
    assert [c.value for c in copied] == [("/opt/stego", "/opt/stego")]


def test_the_last_user_is_a_number_that_is_not_root(dockerfile):
    _, final = stages(dockerfile)
    users = [c.value[0] for c in final if c.cmd.upper() == "USER"]
    assert users == ["1000:1000"]
    assert all(c.cmd.upper() not in ("RUN", "COPY", "ADD") for c in final[final_user(final) :])


def final_user(stage):
    return next(n for n, command in enumerate(stage) if command.cmd.upper() == "USER")


def test_packages_are_held_to_the_constraints_and_the_extras_exist(dockerfile):
    build, _ = stages(dockerfile)
    installs = [c.original for c in build if "pip install" in c.original]
    assert installs
    assert all("-c constraints.txt -c constraints-all.txt" in line for line in installs)
    (stated,) = [c.value[0] for c in build if c.cmd.upper() == "ARG"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    known = project["optional-dependencies"].keys()
    assert set(stated.partition("=")[2].split(",")) <= known
    assert {"gpu", "crf", "report"} <= known  # of the second command in its header
    # What is installed first, to be kept between builds, is what the project asks for.
    assert '"ray[data,train,tune,default]"' in installs[0]
    assert any(line.startswith("ray[data,train,tune,default]") for line in project["dependencies"])


def test_what_is_copied_exists_and_reaches_the_builder(dockerfile):
    ignore = (ROOT / "deploy" / "Dockerfile.dockerignore").read_text().splitlines()
    let_in = {line[1:] for line in ignore if line.startswith("!")}
    copies = [c for c in dockerfile if c.cmd.upper() == "COPY" and not c.flags]
    sources = {source for c in copies for source in c.value[:-1]}
    assert "*" in ignore
    assert sources == let_in
    assert all((ROOT / source).exists() for source in sources)


def test_the_image_asks_for_the_token_and_starts_with_the_doctor(dockerfile):
    _, final = stages(dockerfile)
    (environment,) = [c.value for c in final if c.cmd.upper() == "ENV"]
    assert environment[environment.index("RAY_AUTH_MODE") + 1] == "token"
    for name, value in _RAY_SETTINGS.items():  # processes that wait for work are kept
        assert environment[environment.index(name) + 1] == value
    (start,) = [c.value for c in final if c.cmd.upper() == "CMD"]
    assert start == ("python", "jobs/doctor.py")
    assert (ROOT / start[1]).is_file()
