"""The deployment example: Kubernetes' own schemas, Dagster's own configuration, and our settings accept it."""

import importlib.util
import re
from pathlib import Path

import dagster as dg
import pytest
import yaml

from resources.settings.files import PRESETS, load_settings
from resources.settings.machine import Engine

DEPLOYMENT = PRESETS.parent / "deployment"
DOCUMENTS = list(yaml.safe_load_all((DEPLOYMENT / "kubernetes.yaml").read_text()))
BY_KIND = {document["kind"]: document for document in DOCUMENTS}
FILES = BY_KIND["ConfigMap"]["data"]
POD = BY_KIND["Deployment"]["spec"]["template"]["spec"]
INSTANCE = yaml.safe_load(FILES["dagster.yaml"])
LAUNCHER = INSTANCE["run_launcher"]["config"]
KUBECONFIG = {
    "apiVersion": "v1", "kind": "Config", "current-context": "here",
    "contexts": [{"name": "here", "context": {"cluster": "here", "user": "me"}}],
    "clusters": [{"name": "here", "cluster": {"server": "https://127.0.0.1:1"}}],
    "users": [{"name": "me", "user": {"token": "none"}}],
}  # fmt: skip


def needs(module):
    return pytest.mark.skipif(importlib.util.find_spec(module) is None, reason=f"{module} is not installed")


@pytest.fixture
def launcher(tmp_path):
    """Builds the run launcher of a dagster.yaml as Dagster does; history is in SQLite, as there is no database here."""
    opened = []

    def build(configuration):
        (tmp_path / "dagster.yaml").write_text(yaml.safe_dump(configuration))
        opened.append(dg.DagsterInstance.from_config(str(tmp_path)))
        return opened[-1].run_launcher

    yield build
    for instance in opened:
        instance.dispose()


@needs("kubernetes_validate")
@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document["kind"])
def test_kubernetes_knows_every_field(document):
    import kubernetes_validate

    kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)


@needs("dagster_k8s")
@needs("kubernetes_validate")
def test_the_run_launcher_makes_jobs_that_kubernetes_takes(launcher, tmp_path):
    import kubernetes_validate
    from dagster_k8s import construct_dagster_k8s_job
    from kubernetes.client import ApiClient

    (tmp_path / "kubeconfig").write_text(yaml.safe_dump(KUBECONFIG))
    outside = LAUNCHER | {"load_incluster_config": False, "kubeconfig_file": str(tmp_path / "kubeconfig")}
    configuration = {name: value for name, value in INSTANCE.items() if name != "storage"}
    k8s = launcher(configuration | {"run_launcher": INSTANCE["run_launcher"] | {"config": outside}})
    tags = {"dagster-k8s/config": '{"container_config": {"resources": {"limits": {"nvidia.com/gpu": "4"}}}}'}
    for asked, gpus in (({}, "1"), (tags, "4")):
        context = k8s.get_container_context_for_run(dg.DagsterRun(job_name="iteration", tags=asked))
        sizes = context.get_k8s_job_config(None, k8s)
        job = construct_dagster_k8s_job(sizes, ["dagster"], "run", context.run_k8s_config)
        sent = ApiClient().sanitize_for_serialization(job)
        kubernetes_validate.validate(sent, kubernetes_validate.latest_version(), strict=True)
        (container,) = job.spec.template.spec.containers
        assert container.resources.limits == {"nvidia.com/gpu": gpus}
        assert {"/synpo", "/synpo/settings.yaml", "/synpo/dagster.yaml"} <= {
            mount.mount_path for mount in container.volume_mounts
        }
        assert {variable.name: variable.value for variable in container.env}["SYNPO_HOME"] == "/synpo"


def test_everything_refers_to_what_exists():
    images = {container["image"] for container in POD["containers"]} | {LAUNCHER["job_image"]}
    assert len(images) == 1
    assert (
        BY_KIND["ServiceAccount"]["metadata"]["name"] == POD["serviceAccountName"] == LAUNCHER["service_account_name"]
    )
    for volumes, mounts in [(POD["volumes"], container["volumeMounts"]) for container in POD["containers"]] + [
        (LAUNCHER["volumes"], LAUNCHER["volume_mounts"])
    ]:
        assert {mount["name"] for mount in mounts} <= {volume["name"] for volume in volumes}
        assert {mount["subPath"] for mount in mounts if "subPath" in mount} <= set(FILES)


def test_concurrency_is_as_in_the_project_and_the_settings_load(tmp_path):
    ours = yaml.safe_load((Path(__file__).parents[1] / "synpo_assets/cli/dagster.yaml").read_text())
    assert INSTANCE["concurrency"] == ours["concurrency"]
    assert set(INSTANCE) == {*ours, "storage", "run_launcher"}
    (tmp_path / "settings.yaml").write_text(FILES["settings.yaml"])
    assert load_settings(tmp_path / "settings.yaml").engine.device == "cuda"


def readme_blocks():
    return [
        yaml.safe_load(block)
        for block in re.findall(r"```yaml\n(.+?)```", (DEPLOYMENT / "README.md").read_text(), re.DOTALL)
    ]


def test_the_settings_in_the_description_are_settings():
    assert Engine.model_validate(readme_blocks()[0]["engine"]).ray.workers == 8


@needs("dagster_ray")
def test_the_run_launcher_of_ray_in_the_description_loads(launcher):
    ray = launcher(readme_blocks()[1])
    assert (type(ray).__name__, ray.address, ray.num_gpus) == ("RayRunLauncher", "http://head:8265", 1)
