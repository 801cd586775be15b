"""Which class an object gets that an annotator clicked without picking a label."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

import cv2
import numpy as np
import pytest

from backend.segmenter import DenseMaps, Embedding
from backend.service import PredictRequest, Service
from backend.settings import Settings
from tests.fakes import BrightSegmenter, bright_image

HOUSE_XYXY = (50, 60, 110, 140)


class LandSegmenter(BrightSegmenter):
    """What is bright is a building, or a pond where the image is bluish; and everything may well be a field."""

    labels = ("field", "building", "pond")

    def embed(self, image_rgb: np.ndarray) -> Embedding:
        embedding = super().embed(image_rgb)
        blue = image_rgb[..., 2] > image_rgb[..., 0].astype(int) + 20
        return Embedding({**embedding.features, "blue": blue}, embedding.image_hw, embedding.version)

    def dense(self, embedding: Embedding, *, window_xyxy: tuple[int, int, int, int] | None = None) -> DenseMaps:
        left, top, right, bottom = window_xyxy or (0, 0, *embedding.image_hw[::-1])
        bright, blue = (embedding.features[name][top:bottom, left:right] for name in ("grey", "blue"))
        maps = np.stack([np.full_like(bright, 0.6), np.where(blue, 0, bright), np.where(blue, bright, 0)])
        return DenseMaps(self.labels, maps, np.zeros_like(maps))


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    service = Service(Settings(data_dir=tmp_path_factory.mktemp("data")), segmenter=LandSegmenter())
    service.start()
    yield service
    service.close()


def answer(
    service: Service,
    tags: str,
    *,
    image: np.ndarray | None = None,
    at: tuple[float, float] = (80, 100),
    picked: Any = None,
) -> list[tuple[str, list[str]]]:
    """Tag and labels of each region that a click brings."""
    image = bright_image(HOUSE_XYXY) if image is None else image
    png = cv2.imencode(".png", image[:, :, ::-1])[1].tobytes()
    config = (
        f'<View><Image name="image" value="$image"/>{tags}<KeyPoint name="click" toName="image" smart="true"/></View>'
    )
    value: dict[str, Any] = {"x": at[0] / 2.56, "y": at[1] / 2.56, "width": 0.3}
    prompt = {"type": "keypoint", "to_name": "image", "from_name": "click", "value": value}
    if picked:
        value["keypointlabels"] = [picked]
        prompt["type"] = "keypointlabels"
    task = {"id": 1, "data": {"image": "data:image/png;base64," + base64.b64encode(png).decode()}}
    (result,), _ = service.predict(PredictRequest([task], "1", config, {"result": [prompt]}))
    return [(region["from_name"], region["value"]["polygonlabels"]) for region in result["result"]]


def tag(*labels: str, name: str = "polygon") -> str:
    return f'<PolygonLabels name="{name}" toName="image">{"".join(labels)}</PolygonLabels>'


def label(value: str, predicted: str = "") -> str:
    return f'<Label value="{value}"{f" predicted_values={chr(34)}{predicted}{chr(34)}" if predicted else ""}/>'


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        (tag(label("Building"), label("Pond")), ("polygon", ["Building"])),
        (tag(label("Hut", "building"), label("Pond")), ("polygon", ["Hut"])),
        # A field is likely everywhere, so it says nothing of what was clicked.
        (tag(label("Field"), label("Building")), ("polygon", ["Building"])),
        # The only label, known or not.
        (tag(label("Moon base")), ("polygon", ["Moon base"])),
        # What a model sees there is no label of the project, and so no guess.
        (tag(label("Moon base"), label("Pond")), ("polygon", [])),
        (tag(label("Moon base"), label("Crater")), ("polygon", [])),
        # The class's own tag answers, whichever comes first.
        (tag(label("Pond"), name="water") + tag(label("Building"), name="built"), ("built", ["Building"])),
        (tag(label("Building"), name="one") + tag(label("Building"), name="two"), ("one", ["Building"])),
    ],
)
def test_an_unlabelled_click_gets_the_class_that_the_model_sees_there(service, tags, expected):
    assert answer(service, tags) == [expected]


def test_the_class_depends_on_what_was_clicked(service):
    image = bright_image(HOUSE_XYXY, (150, 60, 210, 140))
    image[60:140, 150:210] = (180, 180, 255)
    tags = tag(label("Building"), label("Pond"))
    assert answer(service, tags, image=image) == [("polygon", ["Building"])]
    assert answer(service, tags, image=image, at=(180, 100)) == [("polygon", ["Pond"])]


def test_an_object_that_fills_the_tile_has_a_class(service):
    assert answer(service, tag(label("Building"), label("Pond")), image=bright_image((0, 0, 256, 256))) == [
        ("polygon", ["Building"])
    ]


def test_the_annotators_word_counts_unless_the_config_lacks_it(service):
    tags = tag(label("Building"), label("Pond"))
    assert answer(service, tags, picked="Pond") == [("polygon", ["Pond"])]
    assert answer(service, tags, picked="Volcano") == [("polygon", ["Building"])]


def test_shipped_weights_tell_a_roof_from_a_field(tmp_path):
    from backend.compact import CompactSegmenter

    rng = np.random.default_rng(1)
    image = rng.normal((70, 95, 55), 8, (256, 256, 3))
    image[104:154, 96:156] = (30, 35, 30)
    image[100:150, 90:150] = rng.normal((205, 200, 195), 5, (50, 60, 3))
    service = Service(Settings(data_dir=tmp_path), segmenter=CompactSegmenter.load())
    service.start()
    try:
        found = answer(
            service, tag(label("Field"), label("Building")), image=image.clip(0, 255).astype(np.uint8), at=(120, 125)
        )
    finally:
        service.close()
    assert found == [("polygon", ["Building"])]
