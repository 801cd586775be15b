"""The human skin: each command parses, calls one function, and says what came of it.

Exit codes: 0 done, 1 failed (one sentence says why), 2 used wrongly.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from . import __version__
from .errors import BackendError, BadRequest
from .settings import Settings

app = typer.Typer(
    name="geoprelabel",
    help="Pre-label aerial, satellite and drone imagery in Label Studio, and export what was reviewed as vectors.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
models_app = typer.Typer(help="A project's model versions.", no_args_is_help=True)
app.add_typer(models_app, name="models")

AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON, for scripts.")]
err = Console(stderr=True)
_debug = False


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
        _fail(str(error))


def _fail(sentence: str, code: int = 1) -> NoReturn:
    err.print(f"[red]error:[/red] {sentence}", highlight=False, soft_wrap=True, markup=True)
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
    logging.basicConfig(
        level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr
    )
    # One line a request of every library would drown ours, and httpx prints whole URLs.
    for noisy in ("httpx", "httpcore", "rasterio", "PIL", "filelock"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
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
        # prometheus-client decides when it is imported whether processes share their figures through files.
        os.environ.setdefault("PROMETHEUS_MULTIPROC_DIR", tempfile.mkdtemp(prefix="geoprelabel-metrics-"))
    from .server import serve as run

    run(settings)


@app.command()
def ingest(
    scenes: Annotated[list[str], typer.Argument(help="Georeferenced rasters.")],
    out: Annotated[Path | None, typer.Option(help="Folder for tiles and tasks.json (GEOPRELABEL_DATA_DIR).")] = None,
    tile_size: Annotated[int, typer.Option(min=64, max=4096, help="Side of a tile, in pixels.")] = 512,
    overlap: Annotated[int, typer.Option(min=0, help="Pixels that neighbours share.")] = 64,
    grid: Annotated[str, typer.Option(help="native, or webmercator")] = "native",
    zoom: Annotated[
        int | None, typer.Option(help="Zoom of the web-mercator grid; empty: that of the pixel size.")
    ] = None,
    bands: Annotated[str, typer.Option(help="Bands to show as red, green, blue, e.g. 4,3,2.")] = "",
    format: Annotated[str, typer.Option(help="jpg, png or webp")] = "jpg",
    image_url_prefix: Annotated[str, typer.Option(help="Where browsers find the tiles; empty: this backend.")] = "",
    as_json: AsJson = False,
) -> None:
    """Cut scenes into tiles that Label Studio can show, each knowing its place on Earth.

    Example: geoprelabel ingest town.tif --out geoprelabel-data
    """
    from .ingest import IngestOptions
    from .ingest import ingest as run

    settings = _settings(data_dir=out)
    try:
        chosen = tuple(int(band) for band in bands.split(",")) if bands else None
    except ValueError as error:
        raise BadRequest(f"--bands must be numbers such as 1,2,3, got {bands!r}") from error
    options = IngestOptions(tile_size=tile_size, overlap=overlap, bands=chosen, format=format, grid=grid, zoom=zoom)
    with _bar("cutting tiles") as show:
        report = run(
            scenes, settings.data_dir, tiles_url=image_url_prefix or settings.tiles_url, options=options, progress=show
        )
    _print(asdict(report), as_json, report.sentence())


@app.command()
def push(
    tasks: Annotated[Path, typer.Argument(help="tasks.json of ingest, or what predict wrote.")],
    project: Annotated[str, typer.Option(help="Title of the project, created where there is none.")] = "GeoPrelabel",
    config: Annotated[Path | None, typer.Option(help="Label config; empty: configs/buildings.xml.")] = None,
    backend_url: Annotated[
        str, typer.Option(help="Where Label Studio reaches this backend.")
    ] = "http://localhost:9090",
    connect: Annotated[
        bool, typer.Option("--connect/--no-connect", help="Connect the backend and its webhook.")
    ] = True,
    as_json: AsJson = False,
) -> None:
    """Import tasks into Label Studio and connect this backend; run twice it adds nothing.

    Example: geoprelabel push geoprelabel-data/tasks.json --project "My town"
    """
    from .push import DEFAULT_CONFIG
    from .push import push as run
    from .service import client_of, read_tasks

    settings = _settings()
    listed = read_tasks(tasks)
    label_config = (config or DEFAULT_CONFIG).read_text(encoding="utf-8")
    with client_of(settings) as label_studio, _bar("pushing") as show:
        done = run(
            label_studio, settings, listed, title=project, label_config=label_config,
            backend_url=backend_url if connect else None, progress=show,
        )  # fmt: skip
    _print(
        asdict(done), as_json,
        f"{done.tasks} tasks imported, {done.already_there} were there, {done.predictions} predictions: {done.url}",
    )  # fmt: skip


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
    as_json: AsJson = False,
) -> None:
    """Pre-label many tasks without Label Studio waiting; an interrupted run goes on where it stopped.

    Example: geoprelabel predict geoprelabel-data/tasks.json --out predictions.json
    """
    from .bulk import predict_project, predict_to_file
    from .push import DEFAULT_CONFIG
    from .service import Service, client_of, project_key_of, read_tasks

    if (tasks is None) == (project is None) or (tasks is not None and out is None):
        raise typer.BadParameter("give TASKS.json with --out FILE, or --project N")
    settings = _settings()
    service = Service(settings)
    service.start()
    try:
        service.predictor.wait(120)
        if project is not None:
            with client_of(settings) as label_studio, _bar("predicting", None) as show:
                found = label_studio.project(project)
                key, label_config = project_key_of(found), found["label_config"]
                report = predict_project(
                    label_studio, project, lambda tasks: service.predict_tasks(tasks, label_config, key),
                    version=service.predictor.version(key), progress=show,
                )  # fmt: skip
        else:
            assert tasks is not None  # checked above
            assert out is not None
            listed, label_config = read_tasks(tasks), (config or DEFAULT_CONFIG).read_text(encoding="utf-8")
            with _bar("predicting", len(listed)) as show:
                report = predict_to_file(
                    listed, out, lambda tasks: service.predict_tasks(tasks, label_config),
                    version=service.predictor.version("0"), progress=show,
                )  # fmt: skip
    finally:
        service.close()
    _print(
        asdict(report), as_json,
        f"{report.predicted} of {report.tasks} tasks predicted, {report.polygons} polygons"
        + (f"; {report.failed} failed (see {settings.data_dir / 'problems.jsonl'})" if report.failed else ""),
    )  # fmt: skip
    if report.failed and not report.predicted:
        raise typer.Exit(1)


@app.command()
def train(
    project: Annotated[str, typer.Option(help="Label Studio's project number.")],
    annotations: Annotated[Path | None, typer.Option(help="A Label Studio JSON export instead of the server.")] = None,
    config: Annotated[Path | None, typer.Option(help="Label config, with --annotations.")] = None,
    queued: Annotated[bool, typer.Option("--queued", hidden=True)] = False,
    as_json: AsJson = False,
) -> None:
    """Learn from a project's accepted annotations: the same training that the webhook starts.

    Example: geoprelabel train --project 3
    """
    from . import fit
    from .jobs import Jobs

    settings = _settings()
    number = project.split(".")[0]
    if not number.isdigit():
        raise BadRequest(f"--project must be Label Studio's project number, got {project!r}")
    if queued:
        # Annotators' clicks come first.
        os.nice(10)
        Jobs(settings).work(project, lambda progress: fit.fit_queued(settings, int(number), progress))
        return
    with _bar("training") as show:
        if annotations is not None:
            done = fit.fit_export(settings, project, annotations, config, progress=show)
        else:
            done = fit.fit_project(settings, int(number), progress=show)
    _print(asdict(done), as_json, done.message)


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
    table = Table("project", "version", "live", "made", "note")
    for v in versions:
        table.add_row(
            v.project, v.name, "yes" if v.is_champion else "", f"{v.created:%Y-%m-%d %H:%M}", v.tags.get("note", "")
        )
    Console().print(table if versions else "no version was trained yet; the shipped model serves all projects")


@models_app.command("show")
def models_show(name: Annotated[str, typer.Argument(help="Name of the version.")]) -> None:
    """All that is known of a version.

    Example: geoprelabel models show compact-1a2b3c4d-5e6f7a8b
    """
    from .errors import UnknownVersion
    from .registry import Registry

    versions = Registry(_settings()).versions()
    for version in versions:
        if version.name == name:
            typer.echo(json.dumps(asdict(version), indent=2, default=str))
            return
    raise UnknownVersion(f"no model version {name!r}; there are: {', '.join(v.name for v in versions) or 'none'}")


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
    typer.echo(f"{version.name} is live for project {version.project}")


@models_app.command("rollback")
def models_rollback(project: Annotated[str, typer.Option(help="Project number or key.")]) -> None:
    """Go back to the version before the live one; before the first there is the shipped model.

    Example: geoprelabel models rollback --project 3
    """
    from .registry import Registry

    registry = Registry(_settings())
    typer.echo(f"{registry.rollback(registry.key(project)) or 'the shipped model'} is live for project {project}")
