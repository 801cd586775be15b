"""What Prometheus is told at /metrics; docs/operations.md says what each figure means.

What one server process counts for itself is added up over all of them by prometheus-client. What all of them share, as
training and versions, is read where it lies when somebody asks: so it is the same whichever process answers.
"""

from __future__ import annotations

import os
import resource
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest, multiprocess
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from . import __version__
from .findings import Finding
from .predictor import BATCH, INTERACTIVE, OPENED
from .service import PredictRequest, Service, free_bytes

_LOOK_EVERY_S = 2.0
_RECENT_S = 3600.0
_URGENCY = {BATCH: "batch", OPENED: "opened", INTERACTIVE: "interactive"}
_OUTCOMES = ("unchanged", "edited", "deleted", "clicked", "drawn")


class Metrics:
    """The figures of one server process, and through `render` of all."""

    def __init__(self, service: Service) -> None:
        """Follow the service; in a server of several processes a thread keeps the figures that others show."""
        self._service = service
        self._registry = own = CollectorRegistry()
        self.seconds = Histogram(
            "geoprelabel_request_seconds", "Time to answer a request", ["route", "status"], registry=own,
            buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.4, 0.5, 1, 2.5, 5, 10, 30, 100),
        )  # fmt: skip
        self._tasks = Counter("geoprelabel_tasks_total", "Tasks predicted", ["kind", "outcome"], registry=own)
        self._findings = Counter(
            "geoprelabel_findings_total", "Things wrong with annotations, when first seen", ["reason"], registry=own
        )
        self._queue_wait = Histogram(
            "geoprelabel_queue_wait_seconds", "Wait in line for the device", ["urgency"], registry=own,
            buckets=(0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
        )  # fmt: skip
        self._encode = Histogram(
            "geoprelabel_encode_seconds", "Time to make an image's embedding", registry=own,
            buckets=(0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
        )  # fmt: skip
        self._cache_requests = Counter(
            "geoprelabel_cache_requests_total", "Looks into a cache: embedding or image, found or not",
            ["cache", "result"], registry=own,
        )  # fmt: skip
        self._queue = Gauge(
            "geoprelabel_queue_depth", "Work in line: for the device, tiles of batches, annotations to check",
            ["queue"], registry=own, multiprocess_mode="livesum",
        )  # fmt: skip
        self._cache_bytes = Gauge(
            "geoprelabel_cache_bytes", "Memory that a cache holds", ["cache"], registry=own, multiprocess_mode="livesum"
        )
        self._resident = Gauge(
            "geoprelabel_resident_memory_bytes", "Memory of all server processes", registry=own,
            multiprocess_mode="livesum",
        )  # fmt: skip
        self._ready = Gauge(
            "geoprelabel_ready", "Whether the model is loaded in every process", registry=own,
            multiprocess_mode="livemin",
        )  # fmt: skip
        self._behind = Gauge(
            "geoprelabel_journal_behind", "Whether events could not be written down and Label Studio has to be asked",
            registry=own, multiprocess_mode="livemax",
        )  # fmt: skip
        for urgency in _URGENCY.values():
            self._queue_wait.labels(urgency)
        for cache in ("embedding", "image"):
            for result in ("hit", "disk_hit", "miss") if cache == "embedding" else ("hit", "miss"):
                self._cache_requests.labels(cache, result)
        service.reviews.on_found = self._found
        service.predictor.gate.on_entered = lambda urgency, waited_s: self._queue_wait.labels(
            _URGENCY.get(urgency, "batch")
        ).observe(waited_s)
        service.predictor.on_embedding = self._embedding
        service.images.on_asked = lambda is_kept: self._cache_requests.labels(
            "image", "hit" if is_kept else "miss"
        ).inc()
        self._look()
        if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
            threading.Thread(target=self._keep_looking, name="metrics", daemon=True).start()

    def count(self, asked: PredictRequest, results: list[Any] | None) -> None:
        """Note what became of a request's tasks; None for a request that failed."""
        kind = "interactive" if asked.context else "batch"
        failed = len(asked.tasks) if results is None else sum(item == [] for item in results)
        self._tasks.labels(kind, "failed").inc(failed)
        self._tasks.labels(kind, "done").inc(len(asked.tasks) - failed)

    def render(self) -> bytes:
        """All metrics as text, those of the other server processes included."""
        self._look()
        shown = CollectorRegistry()
        if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
            multiprocess.MultiProcessCollector(shown)  # type: ignore[no-untyped-call]
            own = generate_latest(shown)
        else:
            own = generate_latest(self._registry)
        shared = CollectorRegistry()
        shared.register(_Shared(self._service))
        return own + generate_latest(shared)

    def _found(self, findings: Sequence[Finding]) -> None:
        for finding in findings:
            self._findings.labels(finding.reason).inc()

    def _embedding(self, source: str, seconds: float) -> None:
        result = {"memory": "hit", "disk": "disk_hit"}.get(source, "miss")
        self._cache_requests.labels("embedding", result).inc()
        if result == "miss":
            self._encode.observe(seconds)

    def _look(self) -> None:
        service = self._service
        for queue, depth in service.queues().items():
            self._queue.labels(queue).set(depth)
        self._cache_bytes.labels("embedding").set(service.predictor.embeddings.memory.nbytes)
        self._cache_bytes.labels("image").set(service.images.nbytes)
        self._resident.set(_resident_bytes())
        self._ready.set(service.predictor.is_ready)
        self._behind.set(service.journal.has_missed)

    def _keep_looking(self) -> None:
        while not self._service.is_closing.wait(_LOOK_EVERY_S):
            self._look()


class _Shared(Collector):
    """What all server processes, and the training beside them, have in common."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterator[Metric]:
        service, version = self._service, ["project", "version"]
        build = _gauge("geoprelabel_build_info", "Release and segmenter", ["version", "segmenter"])
        build.add_metric([__version__, service.settings.segmenter], 1)
        runs = service.jobs.runs()
        training = {
            "running": "Whether the project's model is being trained",
            "failed": "Whether the project's newest training failed",
            "progress": "How far the newest training is, 0 to 1",
            "duration_seconds": "How long the newest training took, or has taken so far",
            "finished_timestamp_seconds": "When the newest training ended, since 1970; 0 while it runs",
            "changes": "Annotations changed since the newest training began",
        }
        families = {name: _gauge(f"geoprelabel_training_{name}", text, ["project"]) for name, text in training.items()}
        for project, run in runs.items():
            values = (run.state == "training", run.state == "failed", run.progress, run.duration_s, run.finished,
                      service.jobs.ask(project).changes)  # fmt: skip
            for family, value in zip(families.values(), values, strict=True):
                family.add_metric([project], float(value))
        versions = _gauge(
            "geoprelabel_model_version_info", "Versions of a project's model, and whether they are live",
            [*version, "live"],
        )  # fmt: skip
        for each in service.predictor.versions:
            versions.add_metric([each.project, each.name, str(each.is_champion).lower()], 1)
        pre_labels = _gauge(
            "geoprelabel_prelabels", "Pre-labels of submitted annotations by what became of them", [*version, "outcome"]
        )
        distance = _gauge(
            "geoprelabel_edit_distance", "Mean 1 - IoU of pre-labels that were kept and what was submitted of them",
            version,
        )  # fmt: skip
        for project, facts in service.acceptance.facts().items():
            for made in facts["versions"]:
                for outcome in _OUTCOMES:
                    pre_labels.add_metric([project, made["name"], outcome], made[outcome])
                distance.add_metric([project, made["name"]], made["edit_distance"] or 0)
        findings = _gauge("geoprelabel_open_findings", "Things wrong with annotations at the moment", ["reason"])
        for reason, count in service.findings.counts().items():
            findings.add_metric([reason], count)
        recent = [problem.when for problem in service.problems.recent(500)]
        problems = _gauge("geoprelabel_recent_problems", "Problems of the last hour, 500 at most", [])
        problems.add_metric([], sum(when > time.time() - _RECENT_S for when in recent))
        last = _gauge("geoprelabel_last_problem_timestamp_seconds", "When the newest problem came, since 1970", [])
        last.add_metric([], max(recent, default=0.0))
        disk = _gauge("geoprelabel_disk_cache_bytes", "Disk that a cache takes", ["cache"])
        disk.add_metric(["embedding"], service.predictor.embeddings.disk.nbytes)
        free = _gauge("geoprelabel_disk_free_bytes", "Room left on the disk of the data folder", [])
        if (left := free_bytes(service.settings.data_dir)) is not None:
            free.add_metric([], left)
        yield from (build, *families.values(), versions, pre_labels, distance, findings, problems, last, disk, free)


def forget_process(pid: int) -> None:
    """Leave out what a server process that is gone said of itself."""
    if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
        multiprocess.mark_process_dead(pid)  # type: ignore[no-untyped-call]


def _gauge(name: str, text: str, labels: Sequence[str]) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, text, labels=labels)


def _resident_bytes() -> float:
    try:
        return float(int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize())
    except OSError:
        # Not what it holds but the most that it ever held; in KiB, or in bytes on macOS.
        unit = 1 if sys.platform == "darwin" else 1024
        return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
