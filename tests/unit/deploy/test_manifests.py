"""Every file in deploy/ against the schema of the tool that reads it, as far as that can be had, and against this
repository: deployment files load, commands and their flags exist, files that are named are there."""

from __future__ import annotations

import configparser
import json
import re
import shlex
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from afd import config
from afd.types import Role
from router.telemetry.metrics import Metrics
from tests.recipes import DEPLOY, recipe
from tests.unit.deploy.commands import check_afd, check_ray, deployment_file

HERE = Path(__file__).parent
ROOT = DEPLOY.parent
KUBERNETES = "1.33"
RAY_FILES = ("ray/on-premise.yaml", "ray/aws.yaml")


def documents(name: str) -> list[Any]:
    return list(yaml.safe_load_all((DEPLOY / name).read_text()))


def schema(name: str) -> Any:
    return json.loads((HERE / name).read_text())


def kubernetes(document: dict[str, Any]) -> None:
    """Raises ValidationError for a field that Kubernetes does not have, or a value that it does not take."""
    kubernetes_validate.validate(document, KUBERNETES, strict=True)


def test_the_readme_names_every_file() -> None:
    page = (DEPLOY / "README.md").read_text()
    for file in DEPLOY.rglob("*"):
        name = str(file.relative_to(DEPLOY))
        if file.is_file() and name != "README.md" and not name.startswith("grafana/provisioning/"):
            assert f"`{name}`" in page, f"deploy/README.md does not say what {name} is for"


@pytest.mark.parametrize("name", ["local.yaml", "cluster.yaml", "heterogeneous.yaml"])
def test_deployment_files_load(name: str) -> None:
    config.load(DEPLOY / name)


def test_commands_of_the_readme_exist() -> None:
    pytest.importorskip("afd.cluster.ray_core")
    headings = ["Two machines", "Ray's cluster launcher", "A job"]
    lines = [
        line.partition(" #")[0].partition(" > ")[0]
        for h in headings
        for block in recipe(h)
        for line in block.splitlines()
    ]
    lines = [re.sub(r"^(\w+=\S+ )+", "", line).strip() for line in lines]
    seen = {words[0] for line in lines if (words := line.split())} - {"#", "export"}
    assert seen == {"afd", "ray"}
    for line in lines:
        if line.startswith("afd "):
            assert check_afd(line)
        if line.startswith("ray "):
            params = check_ray(line)
            inner = shlex.join(params.get("entrypoint", ())) or str(params.get("cmd") or "")
            if "afd " in inner:
                assert check_afd(served(inner))
            if file := params.get("cluster_config_file"):
                assert (ROOT / file).is_file()


def served(script: str) -> str:
    """The `afd serve ...` in a shell script."""
    found = re.search(r"\bafd serve .*", script)
    assert found, script
    return found[0]


@pytest.mark.parametrize("name", RAY_FILES)
def test_rays_launcher_takes_its_files(name: str) -> None:
    pytest.importorskip("afd.cluster.ray_core")
    util = pytest.importorskip("ray.autoscaler._private.util")
    (document,) = documents(name)
    util.validate_config(util.prepare_config(document))
    for source in document["file_mounts"].values():
        assert source.startswith(("~", "/")) or (ROOT / source).exists()
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        for line in document[key]:
            for command in re.findall(r"\bray (?:start|stop).*", line):
                check_ray(command)
    for line in document["setup_commands"]:
        if command := re.search(r"\bafd model .*", line):
            check_afd(command[0])
        else:
            assert (ROOT / "scripts/setup").exists()
            assert line.endswith(" scripts/setup cluster")


def test_what_the_launchers_nodes_offer_is_what_the_deployment_wants() -> None:
    pytest.importorskip("afd.cluster.ray_core")
    wanted = config.load(DEPLOY / "cluster.yaml")
    (document,) = documents("ray/on-premise.yaml")
    for key, section in (("head", wanted.attention), ("worker", wanted.ffn)):
        line = next(line for line in document[f"{key}_start_ray_commands"] if "ray start" in line)
        offered = json.loads(check_ray(line[line.index("ray start") :])["resources"])
        assert offered == section.resources.custom


def kuberay(document: dict[str, Any]) -> None:
    """The same for an object of KubeRay's: its own fields, and its pod templates."""
    jsonschema.validate(document, schema("kuberay.json"))
    for group in groups(document):
        pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": group["template"]}
        kubernetes(pod)


def test_kubernetes_takes_the_manifests() -> None:
    for document in documents("kuberay/config.yaml"):
        kubernetes(document)
    for name in ("kuberay/raycluster.yaml", "kuberay/rayjob.yaml"):
        (document,) = documents(name)
        kuberay(document)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("headGroupSpec.template.spec.container", []),
        ("headGroupSpec.rayStartParam", {}),
        ("workerGroupSpecs.0.replicas", "2"),
    ],
)
def test_a_slip_in_a_manifest_is_found(path: str, value: object) -> None:
    (document,) = documents("kuberay/raycluster.yaml")
    place: Any = document["spec"]
    *way, last = path.split(".")
    for key in way:
        place = place[int(key) if key.isdigit() else key]
    place[last] = value
    with pytest.raises(jsonschema.ValidationError):
        kuberay(document)


def groups(document: dict[str, Any]) -> list[dict[str, Any]]:
    """The head's group and the workers'."""
    cluster = document["spec"].get("rayClusterSpec", document["spec"])
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def test_the_groups_of_pods_have_what_the_deployment_wants() -> None:
    settings, service = documents("kuberay/config.yaml")
    (cluster,), (job,) = documents("kuberay/raycluster.yaml"), documents("kuberay/rayjob.yaml")
    deployment = config.parse(yaml.safe_load(settings["data"]["deployment.yaml"]), "the ConfigMap")
    assert deployment == config.load(DEPLOY / "heterogeneous.yaml")
    assert job["spec"]["rayClusterSpec"] == cluster["spec"]
    assert check_afd(job["spec"]["entrypoint"]) == deployment
    head, *workers = groups(cluster)
    by_name = {group["groupName"]: group for group in workers}
    counts = {"attention": deployment.counts.attention, "ffn": deployment.counts.ffn}
    assert {name: group["replicas"] for name, group in by_name.items()} == counts
    for name, section in (("attention", deployment.attention), ("ffn", deployment.ffn)):
        pod = by_name[name]["template"]["spec"]
        resources = pod["containers"][0]["resources"]
        assert int(resources["limits"]["nvidia.com/gpu"]) == section.resources.num_gpus
        assert int(resources["requests"]["cpu"]) >= section.resources.num_cpus
        assert section.resources.accelerator_type is not None
        assert section.resources.accelerator_type in pod["nodeSelector"]["nvidia.com/gpu.product"].split("-")
    assert service["spec"]["selector"].items() <= head["template"]["metadata"]["labels"].items()
    ports = {port["name"]: port["containerPort"] for port in head["template"]["spec"]["containers"][0]["ports"]}
    assert ports[service["spec"]["ports"][0]["targetPort"]] == deployment.router.port
    for group in (head, *workers):
        mounted = [mount["mountPath"] for mount in group["template"]["spec"]["containers"][0]["volumeMounts"]]
        assert str(Path(deployment.model).parent) in mounted


def test_compose_takes_its_file_and_finds_what_it_names() -> None:
    (document,) = documents("compose.yaml")
    jsonschema.validate(document, schema("compose.json"))
    service = document["services"]["afd"]
    assert (DEPLOY / service["build"]["context"]).resolve() == ROOT
    assert (ROOT / service["build"]["dockerfile"]).is_file()
    deployment = check_afd(["afd", *service["command"]])
    assert deployment
    assert service["ports"] == [f"127.0.0.1:{deployment.router.port}:{deployment.router.port}"]
    for other in document["services"].values():
        for volume in other.get("volumes", ()):
            source = volume.split(":")[0]
            assert source in document["volumes"] or (DEPLOY / source).exists(), source


def test_the_image_copies_what_there_is_and_starts_what_there_is() -> None:
    lines = (DEPLOY / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    copied = [source for line in lines if line.startswith("COPY ") for source in line.split()[1:-1]]
    ignored = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    for source in copied:
        assert (ROOT / source).exists(), source
        assert f"!{source}" in ignored, source
    packaged = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests"}
    assert packaged <= set(copied)
    start = next(json.loads(line.removeprefix("ENTRYPOINT ")) for line in lines if line.startswith("ENTRYPOINT "))
    arguments = next(json.loads(line.removeprefix("CMD ")) for line in lines if line.startswith("CMD "))
    assert check_afd([*start, *arguments])


def test_the_service_of_systemd_starts_what_there_is_and_is_given_time_to_stop() -> None:
    unit = configparser.RawConfigParser(strict=False)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(DEPLOY / "afd.service")
    assert unit.sections() == ["Unit", "Service", "Install"]
    deployment = check_afd(unit["Service"]["ExecStart"])
    assert deployment
    assert float(unit["Service"]["TimeoutStopSec"]) > deployment.router.drain_s
    assert deployment_file("/etc/afd/afd.yaml").name in (DEPLOY / "README.md").read_text()


def exported() -> set[str]:
    """Every series that /metrics can have, with what Prometheus adds to the names of histograms."""
    text = Metrics({Role.ATTENTION: 1.0, Role.FFN: 1.0}).render([]).decode()
    names = set[str]()
    for name, kind in re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE):
        names |= {f"{name}_{part}" for part in ("bucket", "sum", "count")} if kind == "histogram" else {name}
    return names | {"afd_cost_usd_per_million_tokens"}  # there once tokens were paid for


def test_the_dashboard_asks_for_metrics_that_exist() -> None:
    dashboard = json.loads((DEPLOY / "grafana/afd.json").read_text())
    asked = [t["expr"] for panel in dashboard["panels"] for t in panel["targets"]]
    asked += [v["query"] for v in dashboard["templating"]["list"]]
    names = {name for expression in asked for name in re.findall(r"\bafd_\w+", expression)}
    assert len(names) > 15
    assert names <= exported(), names - exported()
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    places = {(p["gridPos"]["x"], p["gridPos"]["y"]) for p in dashboard["panels"]}
    assert len(places) == len(dashboard["panels"])


def test_prometheus_and_grafana_look_where_compose_has_the_other() -> None:
    (compose,), (prometheus,) = documents("compose.yaml"), documents("prometheus.yml")
    (source,) = documents("grafana/provisioning/datasources/prometheus.yaml")[0]["datasources"]
    (provider,) = documents("grafana/provisioning/dashboards/afd.yaml")[0]["providers"]
    (job,) = prometheus["scrape_configs"]
    assert job["static_configs"] == [{"targets": ["afd:8000"]}]
    assert source["url"] == "http://prometheus:9090"
    assert {"afd", "prometheus", "grafana"} == set(compose["services"])
    assert any(f":{provider['options']['path']}/afd.json" in v for v in compose["services"]["grafana"]["volumes"])
