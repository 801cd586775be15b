"""The human skin: each command parses, calls one function, and says what came of it.

Exit codes: 0 done, 1 failed (one sentence says why), 2 used wrongly.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from . import __version__, logs
from .errors import BackendError, BadRequest
from .settings import Settings

if TYPE_CHECKING:
    from distributed import Client

    from .cluster import Crew, Job

app = typer.Typer(
    name="geoprelabel",
    help="Pre-label aerial, satellite and drone imagery in Label Studio, and export what was reviewed as vectors.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
models_app = typer.Typer(help="A project's model versions.", no_args_is_help=True)
app.add_typer(models_app, name="models")
weights_app = typer.Typer(help="Segment Anything's checkpoints.", no_args_is_help=True)
app.add_typer(weights_app, name="weights")

Workers = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="Processes of this machine that share the work; 0: this one alone; empty: one a core, if tiles are many.",
    ),
]
Scheduler = Annotated[
    str | None, typer.Option(help="Or the workers of a Dask cluster, by its scheduler: tcp://host:8786.")
]
Resources = Annotated[str | None, typer.Option(help="What a tile asks of a Dask worker, e.g. GPU=1.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON, for scripts.")]
err = Console(stderr=True)
_debug = False
_WAYS_OUT = {
    errno.ENOSPC: "make room and run the command again",
    errno.EEXIST: "a folder is wanted there; name another",
    errno.ENOTDIR: "a folder is wanted there; name another",
    errno.EISDIR: "a file is wanted there; name one",
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "name a place that this user may write to"),
}


def main() -> None:
    """Run the command line."""
    try:
        app()
    except BackendError as error:
        if _debug:
            raise
        _fail(str(error))
    except KeyboardInterrupt:
        _fail("interrupted; run the command again to go on", code=130)
    except OSError as error:
        if _debug:
            raise
        where = f"{error.filename}: " if error.filename else ""
        way_out = _WAYS_OUT.get(error.errno or 0, "")
        _fail(f"{where}{error.strerror or error}" + (f"; {way_out}" if way_out else ""))


def _fail(sentence: str, code: int = 1) -> NoReturn:
    err.print(f"[red]error:[/red] {escape(sentence)}", highlight=False, soft_wrap=True, markup=True)
    sys.exit(code)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the whole traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    global _debug
    _debug = debug


def _settings(**overrides: Any) -> Settings:
    settings = Settings.from_environment(**{name: value for name, value in overrides.items() if value is not None})
    logs.configure(level=settings.log_level, style=settings.log_format, hidden=settings.secrets)
    return settings


@contextmanager
def _bar(title: str, total: float | None = 1.0) -> Iterator[Callable[..., None]]:
    """A progress bar on standard error; nothing where that is no terminal."""
    columns = [
        TextColumn("{task.description}"),
        BarColumn(),
        *([MofNCompleteColumn()] if total != 1 else []),
        TimeRemainingColumn(),
    ]
    with Progress(*columns, console=err, disable=not err.is_terminal, transient=True) as progress:
        task = progress.add_task(title, total=total)

        def show(done: float, message: str | None = None) -> None:
            progress.update(task, completed=done, description=message or title)

        yield show


def _config(file: Path | None) -> str:
    """The text of a label config; of the one for buildings where none is named."""
    from .push import DEFAULT_CONFIG

    return (file or DEFAULT_CONFIG).read_text(encoding="utf-8")


def _print(result: dict[str, Any], as_json: bool, sentence: str) -> None:
    typer.echo(json.dumps(result, indent=2, default=str) if as_json else sentence)


@app.command()
def serve(
    port: Annotated[int | None, typer.Option(help="Port to listen on (PORT, 9090).")] = None,
    workers: Annotated[int | None, typer.Option(help="Server processes (WORKERS, 1).")] = None,
) -> None:
    """Run the ML backend.

    Example: LABEL_STUDIO_URL=http://localhost:8080 LABEL_STUDIO_API_KEY=… geoprelabel serve
    """
    settings = _settings(port=port, workers=workers)
    if settings.workers > 1:
        # Workers that each take all cores for a tile take them from each other; torch reads this when it is imported.
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, settings.cores // settings.workers)))
        # prometheus-client decides when it is imported whether processes share their figures through files.
        with _metrics_folder() as folder:
            os.environ.setdefault("PROMETHEUS_MULTIPROC_DIR", str(folder))
            _run(settings)
    else:
        _run(settings)


def _run(settings: Settings) -> None:
    from .server import serve as run

    _await_port(settings.port)
    run(settings)


def _await_port(port: int, patience_s: float = 5.0) -> None:
    """Wait until the port is free, as a server that is just ending leaves it. Raises BackendError where it is not."""
    until = time.monotonic() + patience_s
    while True:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("0.0.0.0", port))
                return
            except OSError as error:
                if error.errno != errno.EADDRINUSE or time.monotonic() > until:
                    raise BackendError(
                        f"port {port} cannot be listened at ({error.strerror}); stop what uses it, or set PORT to"
                        " another, for the server and for the commands"
                    ) from error
        time.sleep(0.2)


@contextmanager
def _metrics_folder() -> Iterator[Path]:
    """A folder for the figures that server processes share; those of servers that were killed are removed."""
    prefix = "geoprelabel-metrics-"
    for left in Path(tempfile.gettempdir()).glob(f"{prefix}*-*"):
        number = left.name.removeprefix(prefix).split("-")[0]
        try:
            os.kill(int(number), 0)
        except (ProcessLookupError, ValueError, OverflowError):
            shutil.rmtree(left, ignore_errors=True)
        except OSError:
            continue
    owner = os.getpid()
    folder = Path(tempfile.mkdtemp(prefix=f"{prefix}{owner}-"))
    try:
        yield folder
    finally:
        # The processes that were forked meanwhile end here too.
        if os.getpid() == owner:
            shutil.rmtree(folder, ignore_errors=True)


@app.command()
def ingest(
    scenes: Annotated[
        list[str], typer.Argument(help="Rasters: paths, https:// s3:// gs:// az://, STAC items, .txt lists of these.")
    ],
    out: Annotated[Path | None, typer.Option(help="Folder for tiles and tasks.json (GEOPRELABEL_DATA_DIR).")] = None,
    tile_size: Annotated[int, typer.Option(min=64, max=4096, help="Side of a tile, in pixels.")] = 512,
    overlap: Annotated[int, typer.Option(min=0, help="Pixels that neighbours share.")] = 64,
    grid: Annotated[str, typer.Option(help="native, webmercator, or xyz: the tiles of web maps")] = "native",
    zoom: Annotated[
        int | None, typer.Option(help="Zoom of the web-mercator grids; empty: that of the pixel size.")
    ] = None,
    bands: Annotated[str, typer.Option(help="Bands to show as red, green, blue, e.g. 4,3,2.")] = "",
    nodata: Annotated[
        float | None, typer.Option(help="Value of pixels without data, where the file is silent.")
    ] = None,
    stretch: Annotated[
        str, typer.Option(help="low,high of the values to show, or none; empty: 2 to 98 % of the scene.")
    ] = "",
    rpc_height: Annotated[
        float | None, typer.Option(help="Height of the ground in metres, for scenes that only have RPCs.")
    ] = None,
    xyz_names: Annotated[
        bool, typer.Option("--xyz-names", help="Images named z_x_y.png or z/x/y.png lie where such tiles do.")
    ] = False,
    crs: Annotated[str, typer.Option(help="EPSG:… of rasters whose file does not say it, or says it wrongly.")] = "",
    no_place: Annotated[
        bool, typer.Option("--no-place", help="Take photos without a place too; they export in pixels alone.")
    ] = False,
    format: Annotated[str, typer.Option(help="jpg, png or webp")] = "jpg",
    dynamic: Annotated[
        bool, typer.Option("--dynamic", help="Write no tiles; the backend makes each when it is asked for.")
    ] = False,
    upload: Annotated[
        str, typer.Option(help="s3://bucket/prefix (gs:// az://) to write the tiles to, not to --out.")
    ] = "",
    image_url_prefix: Annotated[
        str, typer.Option(help="Where browsers find the tiles; empty: this backend, or the --upload address.")
    ] = "",
    mosaic: Annotated[str, typer.Option(help="Take all rasters as one scene of this name.")] = "",
    asset: Annotated[str, typer.Option(help="Asset of STAC items; empty: visual, or the only image.")] = "",
    aoi: Annotated[Path | None, typer.Option(help="Polygons, in any CRS: only tiles that touch them.")] = None,
    prelabels: Annotated[
        Path | None, typer.Option(help="Polygons, in any CRS, that become predictions in the tasks.")
    ] = None,
    prelabel_label: Annotated[str, typer.Option(help="Their label; empty: the config's only one.")] = "",
    prelabel_field: Annotated[str, typer.Option(help="Or the attribute that holds it.")] = "",
    config: Annotated[
        Path | None, typer.Option(help="Label config for --prelabels; empty: configs/buildings.xml.")
    ] = None,
    workers: Annotated[int, typer.Option(min=0, help="Processes that cut tiles; 0: one a core, 4 at most.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Cut scenes into tiles that Label Studio can show, each knowing its place on Earth.

    Example: geoprelabel ingest s3://bucket/town.tif --aoi district.gpkg --prelabels footprints.gpkg
    """
    from .ingest import IngestOptions
    from .ingest import ingest as run
    from .stretch import Stretch

    settings = _settings(data_dir=out)
    try:
        chosen = tuple(int(band) for band in bands.split(",")) if bands else None
    except ValueError as error:
        raise BadRequest(f"--bands must be numbers such as 1,2,3, got {bands!r}") from error
    options = IngestOptions(
        tile_size=tile_size, overlap=overlap, format=format, bands=chosen, nodata=nodata, grid=grid, zoom=zoom,
        stretch=Stretch.from_text(stretch), rpc_height_m=rpc_height,
        xyz_names=xyz_names, crs=crs, no_place=no_place,
    )  # fmt: skip
    labelled = None
    if prelabels:
        from .labelstudio import parse_config
        from .prelabels import Labelled

        label_config = parse_config(_config(config))
        labelled = Labelled.of(prelabels, label_config, label=prelabel_label, field=prelabel_field)
    with _bar("cutting tiles") as show:
        report = run(
            scenes, settings.data_dir, tiles_url=image_url_prefix or ("" if upload else settings.tiles_url),
            options=options, mosaic_name=mosaic, asset=asset, aoi=aoi, prelabels=labelled, upload=upload,
            is_dynamic=dynamic, secret="" if image_url_prefix or upload else settings.tiles_secret.get_secret_value(),
            workers=workers or min(4, settings.cores), progress=show,
        )  # fmt: skip
    _print(asdict(report), as_json, report.sentence())


@app.command()
def push(
    tasks: Annotated[Path, typer.Argument(help="tasks.json of ingest, or what predict wrote.")],
    project: Annotated[str, typer.Option(help="Title of the project, created where there is none.")] = "GeoPrelabel",
    config: Annotated[Path | None, typer.Option(help="Label config; empty: configs/buildings.xml.")] = None,
    backend_url: Annotated[
        str, typer.Option(help="Where Label Studio reaches this backend; empty: http://localhost:PORT.")
    ] = "",
    connect: Annotated[
        bool, typer.Option("--connect/--no-connect", help="Connect the backend and its webhook.")
    ] = True,
    storage: Annotated[
        str,
        typer.Option(
            "--storage",
            "--storage-folder",
            help="Push nothing: write a file a task, to s3://bucket/prefix (gs:// az://) or a folder that is synced.",
        ),
    ] = "",
    checks: Annotated[bool, typer.Option("--checks/--no-checks", help="Check first, as doctor does.")] = True,
    as_json: AsJson = False,
) -> None:
    """Import tasks into Label Studio and connect this backend; run twice it adds nothing.

    Example: geoprelabel push geoprelabel-data/tasks.json --project "My town"
    """
    from .annotations import tasks_in, without_task
    from .labelstudio import image_of
    from .push import PATIENCE, write_for_storage
    from .push import push as run
    from .service import client_of, parsed_config

    settings = _settings()
    # Read twice: what is wrong with it is said before anything is sent, and no more than a part is in memory.
    total = sum(1 for _ in tasks_in(tasks))
    if storage:
        with _bar("writing", total) as show:
            written = write_for_storage(tasks_in(tasks), storage, progress=show)
        _print({"written": written, "tasks": total}, as_json, f"{written} of {total} tasks written to {storage}")
        return
    label_config = _config(config)
    if not project.strip():
        raise BadRequest(f"--project must be a title, got {project!r}")
    if connect and backend_url and not backend_url.startswith(("http://", "https://")):
        raise BadRequest(f"--backend-url must start with http:// or https://, got {backend_url!r}")
    parsed = parsed_config(label_config)
    try:
        for task in islice(tasks_in(tasks), 1):
            for tag in parsed.tags:
                image_of(task, tag)
    except BadRequest as error:
        raise BadRequest(f"the label config does not fit {tasks}: {without_task(str(error), task)}") from error
    backend_at = (backend_url or f"http://localhost:{settings.port}") if connect else None
    if checks:
        from .doctor import before_push

        found = [check for check in before_push(settings, backend_at) if check.state != "ok"]
        for check in found:
            err.print(check.line(), markup=False, highlight=False, soft_wrap=True)
        if any(check.state == "fail" for check in found):
            raise BackendError("nothing was pushed (--no-checks pushes all the same)")
    with client_of(settings, attempts=PATIENCE) as label_studio, _bar("pushing") as show:
        done = run(
            label_studio, settings, tasks_in(tasks), title=project, label_config=label_config,
            backend_url=backend_at, total=total, progress=show,
        )  # fmt: skip
    _print(
        asdict(done), as_json,
        f"{done.tasks} tasks imported, {done.already_there} were there, {done.predictions} predictions: {done.url}",
    )  # fmt: skip
    for warning in done.warnings:
        err.print(f"warning: {warning}", markup=False, highlight=False, soft_wrap=True)


@app.command()
def doctor(
    project: Annotated[int | None, typer.Option(help="Also check this project of Label Studio.")] = None,
    backend_url: Annotated[
        str, typer.Option(help="Where Label Studio is to reach this backend, to ask whether it would.")
    ] = "",
    as_json: AsJson = False,
) -> None:
    """Check everything that can be set up wrong, and say what mends it. Exit code 1 where something is wrong.

    Run it where the backend runs, with the same environment. Example: geoprelabel doctor --project 3
    """
    from .doctor import examine

    colours = {"ok": typer.colors.GREEN, "warn": typer.colors.YELLOW, "fail": typer.colors.RED}
    found = []
    for check in examine(_settings(), project=project, backend_url=backend_url):
        found.append(check)
        if not as_json:
            state, rest = check.line()[:4], check.line()[4:]
            typer.echo(typer.style(state, fg=colours[check.state], bold=check.state != "ok") + rest)
    failed = any(check.state == "fail" for check in found)
    if as_json:
        typer.echo(json.dumps({"ok": not failed, "checks": [asdict(check) for check in found]}, indent=2))
    if failed:
        raise typer.Exit(1)


@app.command()
def predict(
    tasks: Annotated[Path | None, typer.Argument(help="tasks.json of ingest.")] = None,
    out: Annotated[Path | None, typer.Option(help="File for the tasks with their predictions.")] = None,
    project: Annotated[
        int | None, typer.Option(help="Predict this project's tasks and import the result instead.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="Label config; empty: configs/buildings.xml, or the project's.")
    ] = None,
    workers: Workers = None,
    scheduler: Scheduler = None,
    resources: Resources = None,
    batch: Annotated[
        int, typer.Option(min=1, help="Tiles that a Dask worker gets at once; more than 1 for thousands of workers.")
    ] = 1,
    keep_blocks: Annotated[
        bool, typer.Option("--keep-blocks", help="Leave the results as Parquet files, too, in OUT.blocks.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Pre-label many tasks without Label Studio waiting; an interrupted run goes on where it stopped.

    Example: geoprelabel predict geoprelabel-data/tasks.json --out predictions.json --workers 4
    """
    from .annotations import tasks_in
    from .bulk import predict_project, predict_to_file
    from .cluster import Job
    from .datamanager import show_scores
    from .service import client_of, parsed_config, project_key_of

    if (tasks is None) == (project is None) or (tasks is not None and out is None):
        raise typer.BadParameter("give TASKS.json with --out FILE, or --project N")
    settings = _settings(dask_scheduler=scheduler, dask_resources=resources)
    if out is not None and out.is_dir():
        raise BadRequest(f"--out {out} is a folder; name a file, such as {out / 'predictions.json'}")
    with ExitStack() as stack:
        if project is not None:
            label_studio = stack.enter_context(client_of(settings))
            found = label_studio.project(project)
            count = int(found.get("task_number") or 0)
            job = Job(found["label_config"], project_key_of(found))
            parsed_config(job.label_config)
            crew = stack.enter_context(_crew(settings, job, workers, count, batch))
            report = predict_project(
                label_studio, project, crew.predict, version=crew.version, fingerprint=crew.fingerprint,
                kept=settings.data_dir / "bulk" / f"{job.project}.jsonl",
                progress=stack.enter_context(_bar("predicting", count or None)),
            )  # fmt: skip
            show_scores(label_studio, project, crew.version)
        else:
            assert tasks is not None  # checked above
            assert out is not None
            count = sum(1 for _ in tasks_in(tasks, unread=True))
            job = Job(_config(config))
            parsed_config(job.label_config)
            crew = stack.enter_context(_crew(settings, job, workers, count, batch))
            report = predict_to_file(
                lambda: tasks_in(tasks), out, crew.predict, fingerprint=crew.fingerprint, keep_blocks=keep_blocks,
                progress=stack.enter_context(_bar("predicting", count)),
            )  # fmt: skip
    for failure in report.failures[:10]:
        err.print(f"{failure.task}: {failure.reason}", markup=False, highlight=False, soft_wrap=True)
    _print(
        asdict(report), as_json,
        f"{report.predicted} of {report.tasks} tasks predicted, {report.polygons} polygons"
        + (f"; {report.resumed} were predicted before" if report.resumed else "")
        + (f"; {report.failed} failed, and the same command tries those again" if report.failed else ""),
    )  # fmt: skip
    if report.failed and not report.predicted:
        raise typer.Exit(1)


@contextmanager
def _crew(settings: Settings, job: Job, workers: int | None, tasks: int, batch: int = 1) -> Iterator[Crew]:
    """Who predicts: this process, so many of this machine, or the cluster that settings name."""
    from . import cluster

    with _dask(settings, workers, tasks) as client:
        if client is None:
            with cluster.in_process(settings, job) as crew:
                yield crew
            return
        resources = cluster.resources_of(settings.dask_resources)
        with cluster.on_workers(client, job, resources=resources, batch=batch) as crew:
            yield crew


@contextmanager
def _dask(settings: Settings, workers: int | None, tasks: int) -> Iterator[Client | None]:
    """Dask's client, None where this process is to work alone; people are told who works, and of the dashboard."""
    from . import cluster

    if workers is None and settings.dask_scheduler:
        who, held = f"the workers of {settings.dask_scheduler}", cluster.remote(settings.dask_scheduler)
    else:
        count = cluster.processes_for(settings, tasks) if workers is None else workers
        if not count:
            yield None
            return
        who = f"{count} processes of this machine" if count > 1 else "a process of this machine"
        # On a GPU the second task is fetched and traced while the first one is there.
        held = cluster.local(
            count, cores=settings.cores, threads=1 if settings.device == "cpu" else 2,
            resources=cluster.resources_of(settings.dask_resources),
        )  # fmt: skip
    with held as client:
        err.print(f"{who}; dashboard: {client.dashboard_link}", markup=False, highlight=False, soft_wrap=True)
        yield client


@app.command()
def prewarm(
    tasks: Annotated[Path | None, typer.Argument(help="tasks.json of ingest.")] = None,
    project: Annotated[int | None, typer.Option(help="This project's tasks in Label Studio instead.")] = None,
    config: Annotated[
        Path | None, typer.Option(help="Label config; empty: configs/buildings.xml, or the project's.")
    ] = None,
    workers: Workers = None,
    scheduler: Scheduler = None,
    resources: Resources = None,
    as_json: AsJson = False,
) -> None:
    """Make the embeddings of many tiles ahead, on disk where the server finds them: then no click waits for one.

    Example: geoprelabel prewarm --project 3
    """
    from . import cluster
    from .annotations import tasks_in
    from .embeddings import EmbeddingFiles
    from .service import Service, client_of, project_key_of

    if (tasks is None) == (project is None):
        raise typer.BadParameter("give TASKS.json or --project N")
    settings = _settings(dask_scheduler=scheduler, dask_resources=resources)
    outcomes: list[bool | None] = []
    with ExitStack() as stack:
        if project is not None:
            label_studio = stack.enter_context(client_of(settings))
            found = label_studio.project(project)
            listed, count = label_studio.tasks(project), int(found.get("task_number") or 0)
            job = cluster.Job(found["label_config"], project_key_of(found))
        else:
            assert tasks is not None  # checked above
            listed, count = tasks_in(tasks), sum(1 for _ in tasks_in(tasks, unread=True))
            job = cluster.Job(_config(config))
        client = stack.enter_context(_dask(settings, workers, count))
        if client is not None:
            warming: Iterable[bool | None] = cluster.warm_tasks(client, settings, job, listed)
        else:
            service = Service(settings)
            service.predictor.start()
            stack.callback(service.close)
            warming = service.warm_tasks(listed, job.label_config, job.project)
        show = stack.enter_context(_bar("embedding", count or None))
        for outcome in warming:
            outcomes.append(outcome)
            show(len(outcomes))
    used_mb = EmbeddingFiles(settings.data_dir / "embeddings", 1).nbytes / 2**20
    made, kept, failed = (sum(outcome is each for outcome in outcomes) for each in (True, False, None))
    is_full = used_mb > 0.9 * settings.embedding_disk_mb
    _print(
        {"tasks": len(outcomes), "made": made, "kept": kept, "failed": failed, "disk_mb": round(used_mb, 1)}, as_json,
        f"{made} of {len(outcomes)} tiles embedded, {kept} were there; {used_mb:.0f} MB on disk"
        + (f"; {failed} failed (see {settings.data_dir / 'problems.jsonl'})" if failed else "")
        + ("; that is near GEOPRELABEL_EMBEDDING_DISK_MB, and the tiles used longest ago are gone" if is_full else ""),
    )  # fmt: skip
    if failed and failed == len(outcomes):
        raise typer.Exit(1)


@app.command()
def everything(
    source: Annotated[Path, typer.Argument(help="An image, or tasks.json of ingest.")],
    out: Annotated[Path, typer.Option(help="File for the outlines, or for the tasks with them as predictions.")],
    config: Annotated[Path | None, typer.Option(help="Label config, for tasks; empty: configs/buildings.xml.")] = None,
    points: Annotated[int, typer.Option(min=1, max=256, help="Clicks along a side of the image.")] = 32,
    min_iou: Annotated[float, typer.Option(min=0, max=1, help="Least IoU that SAM expects.")] = 0.88,
    min_stability: Annotated[float, typer.Option(min=0, max=1, help="Least stability of a shape.")] = 0.95,
    crop_layers: Annotated[int, typer.Option(min=0, max=4, help="Layers of crops, for small objects.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Outline all that Segment Anything sees, without classes: nothing here knows what an outline is of.

    Example: GEOPRELABEL_SEGMENTER=sam_vit_b geoprelabel everything geoprelabel-data/tasks.json --out proposals.json
    """
    from .bulk import predict_to_file
    from .everything import EverythingOptions, everything_in_file
    from .service import everything_in_tasks, parsed_config, proposer_of, read_tasks

    settings = _settings()
    options = EverythingOptions(
        points_per_side=points, least_iou=min_iou, least_stability=min_stability, crop_layers=crop_layers
    )
    segmenter = proposer_of(settings)
    if source.suffix.lower() != ".json":
        with _bar("looking") as show:
            count = everything_in_file(segmenter, source, out, options=options, progress=show)
        _print({"proposals": count}, as_json, f"{count} outlines of no class in {out}")
        return
    listed = read_tasks(source)
    labels = parsed_config(_config(config))
    with _bar("looking", len(listed)) as show:
        report = predict_to_file(
            lambda: listed, out,
            lambda tasks: everything_in_tasks(settings, segmenter, labels, tasks, options=options),
            fingerprint=f"{segmenter.version} {options}", progress=show,
        )  # fmt: skip
    _print(asdict(report), as_json, f"{report.polygons} outlines of no class on {report.predicted} tasks in {out}")


@app.command()
def train(
    project: Annotated[str, typer.Option(help="Label Studio's project number.")],
    annotations: Annotated[Path | None, typer.Option(help="A Label Studio JSON export instead of the server.")] = None,
    config: Annotated[Path | None, typer.Option(help="Label config, with --annotations.")] = None,
    scheduler: Scheduler = None,
    resources: Annotated[str | None, typer.Option(help="What a training asks of a Dask worker, e.g. GPU=1.")] = None,
    queued: Annotated[bool, typer.Option("--queued", hidden=True)] = False,
    piped: Annotated[bool, typer.Option("--piped", hidden=True)] = False,
    as_json: AsJson = False,
) -> None:
    """Learn from a project's accepted annotations: the same training that the webhook starts, at the same place.

    Example: geoprelabel train --project 3
    """
    from . import fit
    from .jobs import Jobs
    from .registry import Registry

    settings = _settings(dask_scheduler=scheduler, dask_training_resources=resources)
    number = project.split(".")[0]
    if not number.isdigit():
        raise BadRequest(f"--project must be Label Studio's project number, got {project!r}")

    def here(progress: fit.Progress) -> tuple[str, str]:
        return fit.fit_queued(settings, int(number), progress)

    def there(progress: fit.Progress) -> tuple[str, str]:
        from .cluster import train

        return train(settings, project, progress)

    if queued:
        # Annotators' clicks come first, and where memory runs out the server is to survive.
        os.nice(10)
        with suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text("500")
        Jobs(settings).work(project, there if settings.dask_scheduler else here)
        return
    if piped:
        from .cluster import tell_training

        tell_training(here, sys.stdout, sys.stdin)
        return
    with _bar("training") as show:
        if annotations is not None:  # a file that workers do not have
            done = fit.fit_export(settings, project, annotations, config, progress=show)
        elif settings.dask_scheduler:
            known = {version.name for version in Registry(settings).versions()}

            def fitted(tell: fit.Progress) -> fit.Fitted:
                version, message = there(tell)
                return fit.Fitted(version, message, is_new=version not in known)

            done = Jobs(settings).train_here(_project_key(settings, project), fitted, show)
        else:
            done = fit.fit_typed(settings, int(number), progress=show)
    _print(asdict(done), as_json, done.message)


def _project_key(settings: Settings, project: str) -> str:
    """The whole key of a project given by its number, as far as this machine can tell: trainings go by it."""
    from .registry import Registry
    from .service import client_of, project_key_of

    if "." in project:
        return project
    if settings.label_studio_url:
        with client_of(settings) as label_studio:
            return project_key_of(label_studio.project(int(project)))
    known = {v.project for v in Registry(settings).versions() if v.project.split(".")[0] == project}
    return known.pop() if len(known) == 1 else project


@app.command()
def forget(
    project: Annotated[str, typer.Option(help="Label Studio's project number, or its whole key <id>.<created>.")],
    as_json: AsJson = False,
) -> None:
    """Delete the annotations that are kept here to learn from, and what was asked of training. Model versions stay.

    Example: geoprelabel forget --project 3
    """
    from .jobs import Jobs
    from .journal import Journal

    settings = _settings()
    with closing(Journal(settings)) as journal:
        keys = [key for key in journal.projects() if project in (key, key.split(".")[0])]
        if not keys:
            known = ", ".join(journal.projects()) or "none"
            raise BadRequest(f"no annotations are kept of project {project!r}; known: {known}")
        for key in keys:
            Jobs(settings).forget(key)
            journal.forget(key)
    _print({"projects": keys}, as_json, f"forgotten: {', '.join(keys)}")


@app.command()
def export(
    out: Annotated[
        Path,
        typer.Option(help="File to write; its ending says how: .geojson .geojsonl .parquet .gpkg .fgb .shp"),
    ],
    project: Annotated[int | None, typer.Option(help="Label Studio's project number.")] = None,
    annotations: Annotated[Path | None, typer.Option(help="A Label Studio JSON export instead of the server.")] = None,
    on_invalid: Annotated[str, typer.Option(help="repair, drop or error")] = "repair",
    merge_seams: Annotated[
        bool, typer.Option("--merge-seams/--no-merge-seams", help="Join objects cut by tiles.")
    ] = True,
    allow_ballpark: Annotated[
        bool, typer.Option("--allow-ballpark", help="Also where PROJ's way to EPSG:4326 is coarser than a pixel.")
    ] = False,
    report: Annotated[Path | None, typer.Option(help="Also write a report as an HTML page.")] = None,
    format: Annotated[
        str, typer.Option(help="A dataset for training instead: coco (a .json), yolo or stac (a folder).")
    ] = "",
    annotations_from: Annotated[
        str, typer.Option(help="Of several annotations of a task: ground_truth (else the newest), latest, or all.")
    ] = "ground_truth",
    edits: Annotated[
        Path | None, typer.Option(help="A .gpkg of an earlier export, edited in QGIS: its edits count, by id.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Reviewed annotations as vectors on Earth (EPSG:4326), valid, and whole across tile borders.

    Example: geoprelabel export --project 3 --out buildings.geojson
    """
    from .edits import read_edits
    from .export import ExportOptions
    from .export import export as run
    from .service import annotated_tasks, task_images

    if (project is None) == (annotations is None):
        raise typer.BadParameter("give --project N or --annotations EXPORT.json")
    settings = _settings()
    options = ExportOptions(
        on_invalid=on_invalid,
        merge_seams=merge_seams,
        allow_ballpark=allow_ballpark,
        format=format,
        annotations_from=annotations_from,
    )
    changed = read_edits(edits) if edits else None
    with (
        _bar("exporting"),
        annotated_tasks(settings, project, annotations) as (tasks, label_config),
        task_images(settings) as image_of,
    ):
        done = run(
            tasks,
            out,
            options=options,
            label_config=label_config,
            report_path=report,
            image_of=image_of,
            edits=changed,
        )
    _print(asdict(done), as_json, done.sentence())


@app.command()
def validate(
    file: Annotated[
        Path | None, typer.Argument(help="An exported vector file, or a JSON export of Label Studio.")
    ] = None,
    project: Annotated[
        int | None, typer.Option(help="Check this project's annotations in Label Studio instead.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="Label config that says which labels there are.")] = None,
    max_overlap: Annotated[
        float | None, typer.Option(min=0, max=1, help="Share of an outline that others of its label may cover.")
    ] = None,
    min_area_m2: Annotated[float | None, typer.Option(min=0, help="Smallest object, in square metres.")] = None,
    as_json: AsJson = False,
) -> None:
    """Check an export or annotations: topology, places, labels, schema. Exit code 1 where something was found.

    Example: geoprelabel validate buildings.geojson
    """
    from .service import client_of
    from .validation import Limits, counted, task_findings
    from .validation import validate as run

    if (file is None) == (project is None):
        raise typer.BadParameter("give a FILE or --project N")
    settings = _settings(max_overlap=max_overlap, min_area_m2=min_area_m2)
    limits = Limits(settings.max_overlap, settings.min_area_m2, settings.min_area_px)
    label_config = config.read_text(encoding="utf-8") if config else None
    with _bar("checking"):
        if project is not None:
            with client_of(settings) as label_studio:
                label_config = label_config or label_studio.project(project)["label_config"]
                tasks = label_studio.tasks(project, only_annotated=True)
                findings = list(task_findings(tasks, label_config=label_config, limits=limits))
        else:
            assert file is not None  # checked above
            findings = run(file, label_config=label_config, limits=limits)
    counts = counted(findings)
    lines = [*map(str, findings), *([""] if findings else []), *(f"{n} x {reason}" for reason, n in counts.items())]
    _print(
        {"counts": counts, "findings": [asdict(finding) for finding in findings]}, as_json,
        "\n".join(lines) if findings else f"{file or f'project {project}'}: nothing found",
    )  # fmt: skip
    if findings:
        raise typer.Exit(1)


@app.command()
def evaluate(
    predicted: Annotated[Path, typer.Argument(help="Polygons to judge.")],
    truth: Annotated[Path, typer.Argument(help="Polygons to judge them by.")],
    as_json: AsJson = False,
) -> None:
    """Polygon F1 at IoU 0.5 and what goes with it.

    Example: geoprelabel evaluate buildings.geojson truth.geojson
    """
    from .evaluation import evaluate as run

    _settings()
    figures = asdict(run(predicted, truth))
    lines = [
        f"{name:>20}  {', '.join(f'{n} {what}' for what, n in value.items()) if isinstance(value, dict) else value}"
        for name, value in figures.items()
    ]
    _print(figures, as_json, "\n".join(lines))


@models_app.command("list")
def models_list(
    project: Annotated[str, typer.Option(help="Project number or key; empty: all.")] = "", as_json: AsJson = False
) -> None:
    """The versions there are, newest first.

    Example: geoprelabel models list --project 3
    """
    from .registry import Registry

    versions = [
        v for v in Registry(_settings()).versions() if not project or v.project.split(".")[0] == project.split(".")[0]
    ]
    if as_json:
        typer.echo(json.dumps([asdict(v) for v in versions], indent=2, default=str))
        return
    # Whole names within 80 columns, since other commands take them; why a version went live or not, `show` says.
    table = Table(box=None)
    for heading in ("project", "version", "live", "made (UTC)", "F1@0.5", "tiles"):
        table.add_column(heading, no_wrap=True, overflow="fold")
    for v in versions:
        judged = v.metrics.get("judging") or {}
        f1 = f"{judged['f1']['before']:.2f} → {judged['f1']['after']:.2f}" if judged else "not judged"
        table.add_row(
            *(v.project.split(".")[0], v.name, "yes" if v.is_champion else "", f"{v.created:%Y-%m-%d %H:%M}", f1),
            str(judged.get("tiles", "")),
        )
    Console().print(table if versions else "no version was trained yet; the shipped model serves all projects")


@models_app.command("show")
def models_show(name: Annotated[str, typer.Argument(help="Name of the version.")], as_json: AsJson = False) -> None:
    """All that is known of a version: where it came from, and its figures beside those of the one live before.

    Example: geoprelabel models show compact-1a2b3c4d-5e6f7a8b
    """
    from .errors import BadWeights, UnknownVersion
    from .registry import Registry

    versions = Registry(_settings()).versions()
    version = next((v for v in versions if v.name == name), None)
    if version is None:
        raise UnknownVersion(f"no model version {name!r}; there are: {', '.join(v.name for v in versions) or 'none'}")
    if as_json:
        typer.echo(json.dumps(asdict(version), indent=2, default=str))
        return
    try:
        version.check()
        weights = f"{version.heads_path}, sha256 {version.sha256 or 'not registered'}"
    except BadWeights as error:
        weights = str(error)
    facts = {
        "version": version.name,
        "project": f"{version.project}, its version number {version.number}",
        "state": "live" if version.is_champion else "not live",
        "made": f"{version.created:%Y-%m-%d %H:%M} UTC",
        "parent": version.parent,
        "weights": weights,
        **version.tags,
        "MLflow run": version.run_id,
    }
    for fact, value in facts.items():
        typer.echo(f"{fact:>20}  {value}")
    judged = version.metrics.get("judging")
    if judged:
        Console().print(_judged_table(judged))


def _judged_table(judged: dict[str, Any]) -> Table:
    """Figures of a version and of the one that was live when it was trained, as `backend.judging` keeps them."""

    def compared(figure: dict[str, float] | None) -> tuple[str, str, str]:
        if not figure:
            return "", "", ""
        return (
            f"{figure['before']:.3f}",
            f"{figure['after']:.3f}",
            f"{figure['low']:+.3f} to {figure['high']:+.3f}",
        )

    table = Table(
        "", "before", "this one", "difference, 90 % sure", title=f"{judged['tiles']} tiles, {judged['objects']} objects"
    )
    table.add_row("F1@0.5", *compared(judged["f1"]))
    table.add_row("IoU of the ground", *compared(judged["area_iou"]))
    for what, name in (("IoU of matched polygons", "matched_iou"), ("calibration error", "calibration_error")):
        table.add_row(what, *("" if value is None else f"{value:.3f}" for value in judged[name]))
    same = "" if judged["clicks_differ"] else " (the same weights answer)"
    table.add_row(f"clicks to IoU 0.85{same}", *compared(judged["clicks"]))
    for label, one in judged["labels"].items():
        table.add_row(f"{label} ({one['objects']}): F1@0.5", *compared(one["f1"]))
        table.add_row(f"{label}: IoU of the ground", *compared(one["area_iou"]))
    return table


@models_app.command("activate")
def models_activate(
    name: Annotated[str, typer.Argument(help="Name of the version.")],
    project: Annotated[str, typer.Option(help="Project number or key.")],
) -> None:
    """Make a version live.

    Example: geoprelabel models activate compact-1a2b3c4d-5e6f7a8b --project 3
    """
    from .registry import Registry

    registry = Registry(_settings())
    version = registry.activate(registry.key(project), name)
    typer.echo(
        f"{version.name} is live for project {version.project}; running servers take it up within 5 s"
        f" (geoprelabel models rollback --project {project} goes back)"
    )


@models_app.command("rollback")
def models_rollback(project: Annotated[str, typer.Option(help="Project number or key.")]) -> None:
    """Go back to the version before the live one; before the first there is the shipped model.

    Example: geoprelabel models rollback --project 3
    """
    from .registry import Registry

    registry = Registry(_settings())
    key = registry.key(project)
    now = registry.rollback(key) or "the shipped model"
    typer.echo(f"{now} is live for project {project}; all versions stay (geoprelabel models list --project {project})")


@weights_app.command("list")
def weights_list(as_json: AsJson = False) -> None:
    """The checkpoints there are, where they come from, and which are here.

    Example: geoprelabel weights list
    """
    from . import checkpoints

    settings = _settings()
    listed = [
        {
            **asdict(checkpoint),
            "url": checkpoint.url(),
            "path": str(settings.sam_dir / checkpoint.file),
            "is_here": (settings.sam_dir / checkpoint.file).is_file(),
        }
        for checkpoint in checkpoints.CHECKPOINTS.values()
    ]
    if as_json:
        typer.echo(json.dumps(listed, indent=2))
        return
    table = Table("name", "MB", "licence", "here", box=None)
    table.add_column("from", overflow="fold")
    for row in listed:
        size = f"{row['nbytes'] / 1e6:.0f}"
        table.add_row(row["name"], size, row["licence"], "yes" if row["is_here"] else "", row["url"])
    Console().print(table)


@weights_app.command("get")
def weights_get(name: Annotated[str, typer.Argument(help="sam_vit_b, sam_vit_l or sam_vit_h.")]) -> None:
    """Fetch a checkpoint into MODEL_DIR/sam; an interrupted one goes on where it stopped.

    Example: geoprelabel weights get sam_vit_b
    """
    from .checkpoints import checkpoint_named, fetch

    settings = _settings()
    checkpoint = checkpoint_named(name)
    with _bar(checkpoint.file) as show:
        path = fetch(
            checkpoint, settings.sam_dir, mirror=settings.weights_mirror,
            progress=lambda done_bytes: show(done_bytes / checkpoint.nbytes),
        )  # fmt: skip
    typer.echo(f"{path} ({checkpoint.nbytes / 1e6:.0f} MB, {checkpoint.licence})")


@weights_app.command("verify")
def weights_verify(
    name: Annotated[str, typer.Argument(help="Name of a checkpoint; empty: all that are here.")] = "",
) -> None:
    """Compare the files with the published hashes. Exit code 1 where one is wrong, or none is here.

    Example: geoprelabel weights verify
    """
    from . import checkpoints

    settings = _settings()
    named = [checkpoints.checkpoint_named(name)] if name else list(checkpoints.CHECKPOINTS.values())
    looked_at = [c for c in named if name or (settings.sam_dir / c.file).is_file()]
    if not looked_at:
        raise BackendError(f"there is no checkpoint in {settings.sam_dir}; run geoprelabel weights get sam_vit_b")
    for checkpoint in looked_at:
        typer.echo(f"{checkpoints.verified(checkpoint, settings.sam_dir)}: as published")
