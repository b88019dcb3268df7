"""Checks of installed packages and of the machine."""

from __future__ import annotations

import hashlib
import os
import platform
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from dist_dcgan.distributed.launch import launched
from dist_dcgan.loggers.wandb_settings import resolve_wandb, source_of_key
from dist_dcgan.preflight.results import Finding, Subject, counted
from dist_dcgan.training.train_state import resolve_precision
from shards.common.files import disk_space
from shards.common.workers import available_cores

_PACKAGE = "dist_dcgan"
_SHARED_MEMORY = Path("/dev/shm")
_SMALL_SHARED_MEMORY = 64 << 20


def versions(subject: Subject) -> Finding:
    """Check versions; torch and the code of this project must be the same on all ranks."""
    found = f"Python {platform.python_version()}, torch {torch.__version__}, torchvision {_version('torchvision')}"
    same = {"the version of torch": str(torch.__version__), f"the code of {_PACKAGE}": _code()}
    try:
        floor = metadata.metadata(_PACKAGE)["Requires-Python"] or ""
    except metadata.PackageNotFoundError:
        floor = ""
    if not SpecifierSet(floor).contains(platform.python_version(), prereleases=True):
        return Finding("FAILED", f"{found}; Python {floor} is needed: make an environment with a newer one")
    return Finding("ok", found, same, "install the same on all nodes")


def requirements(subject: Subject) -> Finding:
    """Check every package that the installed distribution requires against its minimum version."""
    try:
        asked = _requirements("")
    except metadata.PackageNotFoundError:
        return Finding("warning", f"{_PACKAGE} is not installed, so what it asks for is not known: pip install -e .")
    below = dict(_below(asked))
    if not below:
        return Finding("ok", f"{len(asked)} packages, none below its floor")
    wanted = " ".join(f"'{requirement}'" for requirement in below)
    return Finding("FAILED", f"{'; '.join(below.values())}: pip install -U {wanted}")


def eval_extra(subject: Subject) -> Finding:
    """Check for the packages that scores need."""
    try:
        below = dict(_below(_requirements("eval")))
    except metadata.PackageNotFoundError:
        below = {}
    if not below:
        return Finding("ok", "installed")
    lost = "no scores in training, no best generator, no dist_dcgan.evaluate"
    return Finding("warning", f"{'; '.join(below.values())}, so {lost}: pip install -U -e '.[eval]'")


def devices(subject: Subject) -> Finding:
    """Compare the ranks of this node with its GPUs."""
    gpus, ranks = torch.cuda.device_count(), ranks_of_node()
    if 0 < gpus < ranks:
        return Finding("FAILED", f"{ranks} ranks on this node, but {counted(gpus, 'GPU')}: use --nproc_per_node={gpus}")
    device = subject.world.device
    precision = resolve_precision(subject.config.precision, device)
    same = {"the kind of device": "GPU" if gpus else "CPU", "precision": precision}
    remedy = "give every node GPUs of one kind, or name one --precision"
    if device.type == "cpu":
        cores = counted(available_cores(), "core")
        return Finding("ok", f"CPU with {cores}, no GPU; trains in {precision}", same, remedy)
    properties = torch.cuda.get_device_properties(device)
    bf16 = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no bf16"
    each = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, {bf16}"
    return Finding(
        "ok", f"{counted(gpus, 'GPU')} for {counted(ranks, 'rank')}: {each}; trains in {precision}", same, remedy
    )


def threads(subject: Subject) -> Finding:
    """Compare the threads of this node's ranks with its cores."""
    each, ranks, cores = torch.get_num_threads(), ranks_of_node(), available_cores()
    found = f"{counted(ranks, 'rank')} of {counted(each, 'thread')} on {counted(cores, 'core')}"
    if each * ranks <= cores:
        return Finding("ok", found)
    enough = cores // ranks
    remedy = f"set OMP_NUM_THREADS={enough}" if enough else f"use --nproc_per_node={cores}"
    return Finding("warning", f"{found}: they wait for each other; {remedy}")


def shared_memory(subject: Subject) -> Finding | None:
    """Check the size of /dev/shm, which NCCL uses between the GPUs of a node."""
    if sys.platform != "linux" or not _SHARED_MEMORY.is_dir():
        return None
    space = disk_space(_SHARED_MEMORY)
    if space is None:
        return Finding("ok", f"{_SHARED_MEMORY} has no limit")
    found = f"{_SHARED_MEMORY} has {space.total / 2**20:,.0f} MiB"
    if space.total > _SMALL_SHARED_MEMORY:
        return Finding("ok", found)
    return Finding("warning", f"{found}, what containers get by default; several GPUs want more: --shm-size=1g")


def wandb(subject: Subject) -> Finding:
    """Report how W&B would record a run; contacts no server and never shows a key."""
    run = resolve_wandb(subject.config, None)
    if run.mode == "disabled":
        return Finding("ok", "disabled")
    if run.mode == "offline":
        return Finding("ok", f"offline, in the run directory, for the project {run.project}")
    source = source_of_key()
    if source is not None:
        return Finding("ok", f"online, with the key of {source}, in the project {run.project}")
    if run.mode == "auto":
        return Finding("ok", "disabled, no key is configured: `wandb login` does, --wandb offline needs none")
    return Finding("warning", "online, but no key is configured, so it will be recorded offline: `wandb login`")


def ranks_of_node() -> int:
    """Return the number of ranks that torchrun started on this machine, 1 without it."""
    return launched().ranks_of_node


def _code() -> str:
    """Return a short hash of this package's files, as two checkouts may have the same version."""
    digest, root = hashlib.sha256(), Path(__file__).parents[1]
    for path in sorted(root.rglob("*.py")):
        digest.update(os.fsencode(path.relative_to(root)) + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "missing"


def _requirements(extra: str) -> list[Requirement]:
    """Return the requirements of the distribution without extras, or those that `extra` adds."""
    asked = [Requirement(text) for text in metadata.requires(_PACKAGE) or ()]
    plain = [item for item in asked if item.marker is None or item.marker.evaluate({"extra": ""})]
    if not extra:
        return plain
    return [item for item in asked if item not in plain and item.marker and item.marker.evaluate({"extra": extra})]


def _below(asked: list[Requirement]) -> Iterator[tuple[str, str]]:
    """Yield the requirement for pip, and the problem, of each package that is missing or too old."""
    for requirement in asked:
        found = _version(requirement.name)
        wanted = f"{requirement.name}{requirement.specifier}"
        if found == "missing":
            yield wanted, f"{requirement.name} is missing"
        elif not requirement.specifier.contains(found, prereleases=True):
            yield wanted, f"{requirement.name} is {found}, {requirement.specifier} is needed"
