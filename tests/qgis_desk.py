"""What a person does in QGIS, for `test_qgis`: run by the Python that PyQGIS belongs to, which is the system's.

``look FILE…`` opens files as QGIS does and says what it sees, ``render FILE PICTURE`` draws one, ``edit FILE`` edits a
GeoPackage: a corner moved, a label changed, a feature split, one deleted, one copied, one drawn, a point moved, deleted
and set. Answers are JSON.
"""

import json
import sys

from qgis.core import (
    Qgis,
    QgsApplication,
    QgsDistanceArea,
    QgsFeature,
    QgsGeometry,
    QgsMapRendererParallelJob,
    QgsMapSettings,
    QgsPointXY,
    QgsProject,
    QgsProviderRegistry,
    QgsVectorLayer,
    QgsVectorLayerUtils,
    QgsWkbTypes,
)
from qgis.PyQt.QtCore import QSize


def layers_of(path):
    """Every layer of a file, with the style that it comes with."""
    # As the browser and drag and drop do: a file of points and polygons is two layers.
    found = QgsProviderRegistry.instance().querySublayers(path, Qgis.SublayerQueryFlag.ResolveGeometryType)
    opened = [
        QgsVectorLayer(each.uri(), each.name(), "ogr") for each in found if each.wkbType() != QgsWkbTypes.NoGeometry
    ]
    assert all(layer.isValid() for layer in opened), f"{path}: {[layer.name() for layer in opened]}"
    return opened


def seen(layer):
    """What QGIS makes of a layer."""
    measure = QgsDistanceArea()
    measure.setEllipsoid("WGS84")
    features = list(layer.getFeatures())
    shapes = [feature.geometry() for feature in features]
    renderer = layer.renderer()
    is_area = layer.geometryType() == QgsWkbTypes.PolygonGeometry
    if renderer is None:
        return {"name": layer.name(), "kind": QgsWkbTypes.displayString(layer.wkbType()), "count": len(features)}
    if renderer.type() == "categorizedSymbol":
        # Held by a name: PyQGIS does not keep alive what a temporary list owns.
        listed = renderer.categories()
        categories = [[one.value(), one.label(), one.symbol().color().name()] for one in listed]
        symbol = listed[0].symbol()
    else:
        symbol = renderer.symbol()
        categories = [[None, "", symbol.color().name()]]
    return {
        "name": layer.name(),
        "kind": QgsWkbTypes.displayString(layer.wkbType()),
        "crs": layer.crs().authid(),
        "count": len(features),
        "area_m2": sum(measure.measureArea(shape) for shape in shapes) if is_area else None,
        "is_valid": all(shape.isGeosValid() for shape in shapes),
        "fields": layer.fields().names(),
        "renderer": renderer.type(),
        "attribute": renderer.classAttribute() if renderer.type() == "categorizedSymbol" else "",
        "categories": categories,
        "symbol": symbol.symbolLayer(0).layerType(),
        "fill_alpha": symbol.color().alpha(),
    }


def render(path, picture):
    """The file as the map window shows it."""
    layers = layers_of(path)
    settings = QgsMapSettings()
    settings.setLayers(sorted(layers, key=lambda layer: layer.geometryType()))
    settings.setDestinationCrs(layers[0].crs())
    settings.setOutputSize(QSize(640, 480))
    extent = layers[0].extent()
    extent.scale(1.1)
    settings.setExtent(extent)
    job = QgsMapRendererParallelJob(settings)
    job.start()
    job.waitForFinished()
    image = job.renderedImage()
    assert image.save(picture)
    return {"errors": [error.message for error in job.errors()]}


def edit(path):
    """Edit and save; what was done to which feature."""
    layers = {layer.name(): layer for layer in layers_of(path)}
    areas = next(layer for layer in layers.values() if layer.name() + "_points" in layers)
    points = layers[areas.name() + "_points"]
    by_size = sorted(areas.getFeatures(), key=lambda feature: -feature.geometry().area())
    moved, split, copied, relabelled, deleted = by_size[:5]
    areas.startEditing()
    first = moved.geometry().vertexAt(0)
    assert areas.moveVertex(first.x() - 1e-5, first.y(), moved.id(), 0)
    assert areas.changeAttributeValue(relabelled.id(), areas.fields().indexOf("label"), "field")
    assert areas.deleteFeature(deleted.id())
    middle, box = split.geometry().pointOnSurface().asPoint(), split.geometry().boundingBox()
    box.scale(1.1)
    line = [QgsPointXY(middle.x() + box.width() / 8, y) for y in (box.yMinimum(), box.yMaximum())]
    areas.selectByIds([split.id()])
    assert areas.splitFeatures(line) == Qgis.GeometryOperationResult.Success
    # Copied and pasted, then dragged aside.
    twin = QgsVectorLayerUtils.createFeature(
        areas, copied.geometry(), {i: value for i, value in enumerate(copied.attributes()) if i}
    )
    shifted = QgsGeometry(copied.geometry())
    shifted.translate(0.01, 0)
    twin.setGeometry(shifted)
    assert areas.addFeature(twin)
    drawn = QgsFeature(areas.fields())
    drawn.setGeometry(QgsGeometry.fromWkt("MultiPolygon(((9 9, 9.001 9, 9.001 9.001, 9 9.001, 9 9)))"))
    drawn["label"] = "drawn"
    assert areas.addFeature(drawn)
    assert areas.commitChanges(), areas.commitErrors()

    stays, goes, *_ = sorted(points.getFeatures(), key=lambda feature: feature["id"])
    points.startEditing()
    place = stays.geometry().asPoint()
    assert points.changeGeometry(stays.id(), QgsGeometry.fromPointXY(QgsPointXY(place.x() + 1e-5, place.y())))
    assert points.deleteFeature(goes.id())
    tree = QgsFeature(points.fields())
    tree.setGeometry(QgsGeometry.fromPointXY(QgsPointXY(9.5, 9.5)))
    tree["label"] = "tree"
    assert points.addFeature(tree)
    assert points.commitChanges(), points.commitErrors()
    return {
        "moved": moved["id"],
        "split": split["id"],
        "copied": copied["id"],
        "relabelled": relabelled["id"],
        "deleted": deleted["id"],
        "point_moved": [stays["id"], place.x() + 1e-5, place.y()],
        "point_deleted": goes["id"],
    }


def main():
    application = QgsApplication([], False)
    application.initQgis()
    task, *names = sys.argv[1:]
    if task == "look":
        answer = {name: [seen(layer) for layer in layers_of(name)] for name in names}
        answer["version"] = Qgis.QGIS_VERSION
    else:
        answer = {"render": render, "edit": edit}[task](*names)
    QgsProject.instance().clear()
    print("ANSWER " + json.dumps(answer))
    application.exitQgis()


main()
