"""A Docker engine, and the images that docker-compose.yml asks it for.

The engine is the one that `docker` finds, by DOCKER_HOST for instance. An image that it has is used as it is; for one
that it has not, a stand-in is built from Debian's packages, so that no registry is needed.

    COMPOSE_TEST_BASE           the image that stand-ins are built on; debian:trixie-slim if it is not set
    PIP_CERT, PIP_CONFIG_FILE   are given to the pip of the build, too
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import yaml

from support.paths import ROOT

_DOCKERFILE = ROOT / "deploy" / "Dockerfile"
_STAND_INS = Path(__file__).with_name("stand-ins.Dockerfile")
_BUILD_SECONDS = 1_200.0


def find_missing() -> str | None:
    """Return what is missing to build images and compose them, in words, or None."""
    if shutil.which("docker") is None:
        return "the command docker is missing; install Docker with its plugins compose (v2) and buildx"
    for command, missing in (
        (["version"], "no Docker engine answers; start one, or set DOCKER_HOST"),
        (["compose", "version"], "Docker's plugin compose (v2) is missing"),
        (["buildx", "version"], "Docker's plugin buildx is missing"),
    ):
        done = subprocess.run(["docker", *command], capture_output=True, text=True)
        if done.returncode != 0:
            return f"{missing}: {done.stderr.strip()}"
    return None


def run_docker(*arguments: str, timeout_seconds: float = 120.0) -> str:
    """Run `docker` and return what it prints.

    Raises:
        AssertionError: It failed; the message has all that it said.
    """
    done = subprocess.run(
        ["docker", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout_seconds,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, f"docker {' '.join(arguments)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def build_stand_ins() -> list[str]:
    """Build a stand-in for each image that the engine has not, and return their names."""
    base = os.environ.get("COMPOSE_TEST_BASE", "debian:trixie-slim")
    built = []
    for target, name in find_replaceable_images().items():
        if subprocess.run(["docker", "image", "inspect", name], capture_output=True).returncode == 0:
            continue
        options = ["--build-arg", f"BASE={base}", "--target", target, "--tag", name, "--file", str(_STAND_INS)]
        _build(*options, str(_STAND_INS.parent))
        built.append(name)
    return built


def build_shop() -> None:
    """Build the image of the example."""
    secrets = []
    for name, variable in (("ca", "PIP_CERT"), ("pip.conf", "PIP_CONFIG_FILE")):
        if os.environ.get(variable):
            secrets += ["--secret", f"id={name},src={os.environ[variable]}"]
    _build(*secrets, "--tag", "celery-sharding-shop", "--file", str(_DOCKERFILE), str(ROOT))


def find_replaceable_images() -> dict[str, str]:
    """Return what stand-ins there are, each with the name of the image that it stands in for."""
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"].values()
    images = [*re.findall(r"^ARG PYTHON=(\S+)$", _DOCKERFILE.read_text(), re.MULTILINE)]
    images += [service["image"] for service in services]
    by_target = {image.partition(":")[0].rpartition("/")[2]: image for image in images}
    targets = re.findall(r"^FROM \S+ AS (\w+)$", _STAND_INS.read_text(), re.MULTILINE)
    return {target: by_target[target] for target in targets}


def _build(*arguments: str) -> None:
    run_docker("buildx", "build", "--load", *arguments, timeout_seconds=_BUILD_SECONDS)
