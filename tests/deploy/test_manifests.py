"""Manifests of deploy/: valid against their schemas, true to the settings, and with enough time to drain."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from deploy.helpers_processes import DEPLOY, ROOT
from tokenwire.config import Settings
from tokenwire.observe.metrics import DECLARATIONS
from tokenwire.rpc.state import WorkerState
from tokenwire.v1 import inference_pb2

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

KUBERNETES = DEPLOY / "kubernetes"
KUBERNETES_VERSION = "1.34"  # the first with a stable preStop sleep
SECONDS_TO_EXIT = 10

# Kinds of extensions: their API version as installed by the releases that the manifests name.
CUSTOM = {
    "ServiceMonitor": "monitoring.coreos.com/v1",
    "InferencePool": "inference.networking.k8s.io/v1",
    "HTTPRoute": "gateway.networking.k8s.io/v1",
    "GRPCRoute": "gateway.networking.k8s.io/v1",
}
PATCHES = {"gpu.yaml", "http.yaml"}


def manifests() -> list[tuple[str, dict[str, Any]]]:
    """Every object that an overlay adds, with its file's name."""
    found = []
    for kustomization in sorted(KUBERNETES.glob("*/kustomization.yaml")):
        for name in yaml.safe_load(kustomization.read_text(encoding="utf-8"))["resources"]:
            path = kustomization.parent / name
            if path.is_file():
                found += [(name, item) for item in yaml.safe_load_all(path.read_text(encoding="utf-8"))]
    return found


def manifest(kind: str) -> dict[str, Any]:
    return next(item for _, item in manifests() if item["kind"] == kind)


def pod() -> dict[str, Any]:
    return manifest("Deployment")["spec"]["template"]["spec"]  # type: ignore[no-any-return]


def worker() -> dict[str, Any]:
    (container,) = pod()["containers"]
    return container  # type: ignore[no-any-return]


def worker_settings(overlay: str) -> dict[str, Any]:
    return tomllib.loads((KUBERNETES / overlay / "worker.toml").read_text(encoding="utf-8"))


def default_of(name: str) -> Any:
    return Settings.model_fields[name].default


@pytest.mark.parametrize(
    ("name", "item"), manifests(), ids=lambda value: value if isinstance(value, str) else value["kind"]
)
def test_a_manifest_is_valid(name: str, item: dict[str, Any]) -> None:
    if item["kind"] in CUSTOM:
        assert item["apiVersion"] == CUSTOM[item["kind"]]
        return
    kubernetes_validate.validate(item, KUBERNETES_VERSION, strict=True)


def test_every_file_belongs_to_an_overlay() -> None:
    used = {name for name, _ in manifests()} | PATCHES | {"kustomization.yaml", "worker.toml"}
    used.add("prometheus-adapter.yaml")  # values of somebody else's chart
    assert {path.name for path in KUBERNETES.rglob("*") if path.is_file()} == used


def test_selectors_name_the_workers() -> None:
    labels = manifest("Deployment")["spec"]["template"]["metadata"]["labels"]
    for name, item in manifests():
        spec = item.get("spec", {})
        selector = spec.get("selector") or spec.get("podSelector") or {}
        selector = selector.get("matchLabels", selector)
        if item["kind"] == "ServiceMonitor":
            service = next(i for _, i in manifests() if i["metadata"]["name"] == "tokenwire-metrics")
            # The first of these labels comes from the kustomization.
            assert selector == {"app.kubernetes.io/name": "tokenwire", **service["metadata"]["labels"]}
        elif selector:
            assert selector == labels, name


@pytest.mark.parametrize("overlay", ["base", "cuda"])
def test_the_settings_of_the_pods_are_settings(overlay: str) -> None:
    """The model and the key file are on volumes that only a pod has; all else is what the worker itself accepts."""
    Settings.model_validate(worker_settings(overlay))
    environment = {variable["name"] for variable in worker()["env"]}
    environment |= {
        variable["name"]
        for patch in ("cuda/gpu.yaml", "gateway-api/http.yaml")
        for container in yaml.safe_load((KUBERNETES / patch).read_text(encoding="utf-8"))["spec"]["template"]["spec"][
            "containers"
        ]
        for variable in container.get("env", ())
    }
    assert {name.removeprefix("TOKENWIRE_").lower() for name in environment} <= set(Settings.model_fields)


def test_a_pod_has_time_to_drain() -> None:
    sleep = worker()["lifecycle"]["preStop"]["sleep"]["seconds"]
    for overlay in ("base", "cuda"):
        drain = worker_settings(overlay)["drain_seconds"]
        assert pod()["terminationGracePeriodSeconds"] == sleep + drain + SECONDS_TO_EXIT
    # Endpoints must have left every proxy before the worker refuses: longer than two readiness periods.
    assert sleep >= 2 * worker()["readinessProbe"]["periodSeconds"]


def test_services_and_units_have_time_to_drain() -> None:
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
    for name in ("worker1", "worker2"):
        service = compose["services"][name]
        grace = int(service["stop_grace_period"].removesuffix("s"))
        assert grace >= int(service["environment"]["TOKENWIRE_DRAIN_SECONDS"]) + SECONDS_TO_EXIT
        settings = {key.removeprefix("TOKENWIRE_").lower() for key in service["environment"]}
        assert settings <= set(Settings.model_fields)
    unit = (DEPLOY / "systemd" / "tokenwire@.service").read_text(encoding="utf-8")
    stop = re.search(r"^TimeoutStopSec=(\d+)$", unit, re.MULTILINE)
    assert stop is not None
    assert int(stop[1]) >= default_of("drain_seconds") + SECONDS_TO_EXIT


def test_probes_ask_for_health_services_that_exist_on_the_health_port() -> None:
    ports = {port["name"]: port["containerPort"] for port in worker()["ports"]}
    settings = worker_settings("base")
    assert ports == {"grpc": settings["port"], "health": settings["health_port"], "metrics": settings["metrics_port"]}
    for kind in ("startup", "liveness", "readiness"):
        probe = worker()[f"{kind}Probe"]["grpc"]
        assert probe == {"port": settings["health_port"], "service": kind}
        assert WorkerState().is_serving(kind) is not None


def test_a_pod_is_not_root_and_cannot_write_its_root() -> None:
    assert pod()["securityContext"]["runAsNonRoot"] is True
    assert pod()["automountServiceAccountToken"] is False
    for container in (*pod()["initContainers"], worker()):
        context = container["securityContext"]
        assert context["readOnlyRootFilesystem"] is True
        assert context["allowPrivilegeEscalation"] is False
        assert context["capabilities"] == {"drop": ["ALL"]}


def test_the_autoscaler_asks_for_gauges_that_are_exported() -> None:
    gauges = {item.name for item in DECLARATIONS if item.kind == "gauge"}
    asked = {metric["pods"]["metric"]["name"] for metric in manifest("HorizontalPodAutoscaler")["spec"]["metrics"]}
    assert asked == {"tokenwire_request_queue_depth", "tokenwire_pool_utilization_ratio"}
    assert asked <= gauges
    adapter = (KUBERNETES / "monitoring" / "prometheus-adapter.yaml").read_text(encoding="utf-8")
    assert all(name in adapter for name in asked)


def test_the_policy_lets_in_what_the_ports_are_for() -> None:
    policy = manifest("NetworkPolicy")["spec"]
    open_ports = {port["port"] for rule in policy["ingress"] for port in rule["ports"]}
    settings = worker_settings("base")
    assert open_ports == {settings["port"], settings["metrics_port"]}
    assert set(policy["policyTypes"]) == {"Ingress", "Egress"}


def test_the_image_is_built_from_what_it_may_see() -> None:
    """Every source that the Containerfile and the build read passes the ignore file."""
    allowed = {line[1:] for line in (ROOT / ".containerignore").read_text().splitlines() if line.startswith("!")}
    for needed in ("CMakeLists.txt", "LICENSE", "NOTICE", "README.md", "pyproject.toml", "native", "protos", "service"):
        assert needed in allowed
        assert Path(ROOT / needed).exists()
    text = (DEPLOY / "Containerfile").read_text(encoding="utf-8")
    assert "torch" not in (ROOT / "requirements" / "runtime.txt").read_text(encoding="utf-8")
    assert re.search(r"^USER 65532:65532$", text, re.MULTILINE)
    assert pod()["securityContext"]["runAsUser"] == 65532


def test_ray_serves_the_contract_by_its_own_names() -> None:
    config = yaml.safe_load((DEPLOY / "ray" / "config.yaml").read_text(encoding="utf-8"))
    (function,) = config["grpc_options"]["grpc_servicer_functions"]
    module, name = function.rsplit(".", 1)
    assert callable(getattr(importlib.import_module(module), name))
    replica = (DEPLOY / "ray" / "tokenwire_ray.py").read_text(encoding="utf-8")
    for method in inference_pb2.DESCRIPTOR.services_by_name["Inference"].methods_by_name:
        assert re.search(rf"async def {method}\(", replica)
