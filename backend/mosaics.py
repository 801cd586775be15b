"""Several rasters as one: on the grid of the first, the later on top, read through GDAL's tile index."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import rasterio
from rasterio.enums import ColorInterp
from rasterio.errors import RasterioError
from rasterio.warp import transform_bounds

from .errors import BadScene
from .sources import is_remote, shown


@contextmanager
def mosaic(addresses: Sequence[str], *, folder: Path | None = None) -> Iterator[str]:
    """The address of a raster that shows them all; it is there as long as the context is, in ``folder`` for good.

    Its grid is the first one's, continued: same CRS, same pixel size, same origin. What lies on another grid is
    resampled (bilinear) to it when it is read. All must have the same bands of the same type. What none covers holds no
    data. Raises BadScene with the one that does not fit.
    """
    import geopandas
    import shapely

    first: Any = None
    boxes: list[Any] = []
    for address in addresses:
        try:
            with rasterio.open(address) as raster:
                if raster.crs is None or raster.transform.is_identity:
                    raise BadScene(f"{shown(address)} has no place on Earth; a mosaic needs georeferenced rasters")
                kind = (raster.count, raster.dtypes, raster.colorinterp)
                if first is None:
                    first = _Grid(raster, address)
                if kind[:2] != first.kind[:2]:
                    raise BadScene(
                        f"{shown(address)} has {kind[0]} bands of {kind[1][0]}, {shown(addresses[0])}"
                        f" {first.kind[0]} of {first.kind[1][0]}; a mosaic needs rasters of one kind"
                    )
                if raster.transform.b or raster.transform.d:
                    raise BadScene(f"{shown(address)} is rotated; warp it first: gdalwarp -t_srs … in.tif out.tif")
                left, bottom, right, top = raster.bounds
                low, high = sorted((bottom, top))
                boxes.append(
                    shapely.box(*transform_bounds(raster.crs, first.crs, left, low, right, high, densify_pts=41))
                )
        except RasterioError as error:
            raise BadScene(f"{shown(address)} cannot be opened: {error}") from error
    with ExitStack() as stack:
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="geoprelabel-")))
        folder = folder.absolute()
        folder.mkdir(parents=True, exist_ok=True)
        index = folder / "index.gpkg"
        index.unlink(missing_ok=True)
        located = [address if is_remote(address) else str(Path(address).absolute()) for address in addresses]
        frame = geopandas.GeoDataFrame({"location": located}, geometry=boxes, crs=first.crs.to_wkt())
        frame.to_file(index, driver="GPKG", layer="index")
        described = folder / "mosaic.gti"
        described.write_text(first.index_xml(index, shapely.total_bounds(boxes)), encoding="utf-8")
        yield str(described)


class _Grid:
    """The first raster's pixels, continued in all directions."""

    def __init__(self, raster: Any, address: str) -> None:
        self.crs = raster.crs
        self.kind = (raster.count, raster.dtypes, raster.colorinterp)
        self.transform = raster.transform
        self.size = abs(raster.transform.a), abs(raster.transform.e)
        self.has_alpha = ColorInterp.alpha in raster.colorinterp
        self.address = address

    def index_xml(self, index: Path, bounds: Any) -> str:
        """GDAL's description of the mosaic (https://gdal.org/en/stable/drivers/raster/gti.html)."""
        (x0, y0), (width, height) = (self.transform.c, self.transform.f), self.size
        # A millionth of a pixel beyond the grid is rounding, not another pixel.
        west = x0 + math.floor((bounds[0] - x0) / width + 1e-6) * width
        east = x0 + math.ceil((bounds[2] - x0) / width - 1e-6) * width
        south = y0 + math.floor((bounds[1] - y0) / height + 1e-6) * height
        north = y0 + math.ceil((bounds[3] - y0) / height - 1e-6) * height
        entries = {
            "IndexDataset": escape(str(index)),
            "ResX": repr(width), "ResY": repr(height),
            "MinX": repr(west), "MinY": repr(south), "MaxX": repr(east), "MaxY": repr(north),
            "Resampling": "bilinear",
            # An alpha band says where there is data by itself.
            **({} if self.has_alpha else {"MaskBand": "true"}),
        }  # fmt: skip
        listed = "".join(f"<{name}>{value}</{name}>" for name, value in entries.items())
        return f"<GDALTileIndexDataset>{listed}</GDALTileIndexDataset>"
