"""Everything that goes wrong in a way a person can mend.

::

    BackendError
    ├── BadRequest            what came over the wire is not what the route takes
    │   ├── BadConfig         the label config lacks what predictions need
    │   └── BadPrompt         a click or box that cannot be read
    ├── BadTile               a task's place on Earth cannot be read, or there is none
    ├── BadImage              an image that cannot be fetched or decoded
    │   └── ImageRefused      a host, path or size that we do not fetch
    ├── BadScene              a raster that cannot be cut into tiles
    ├── BadWeights            model weights that are missing, damaged or of another kind
    ├── LabelStudioError      Label Studio is down, refuses, or answers nonsense
    │   └── LabelStudioDenied the token is missing, wrong or expired
    ├── TrainingError         nothing to learn from, or the run failed
    ├── ExportError           annotations that cannot become features
    ├── Busy                  more is asked at once than can be answered in time
    └── UnknownVersion        a model version that the registry does not hold

Library code raises these; the server turns them into an HTTP status through one table, the command line into
exit code 1 and one sentence. The message holds the value that was wrong and, where there is one, the way out.
"""

from __future__ import annotations


class BackendError(Exception):
    """Root of all errors with a sentence for the user."""


class BadRequest(BackendError):
    """What came over the wire is not what the route takes."""


class BadConfig(BadRequest):
    """The label config lacks what predictions need."""


class BadPrompt(BadRequest):
    """A click or box that cannot be read."""


class BadTile(BackendError):
    """A task's place on Earth cannot be read, or there is none."""


class BadImage(BackendError):
    """An image that cannot be fetched or decoded."""


class ImageRefused(BadImage):
    """A host, path or size that is not fetched."""


class BadScene(BackendError):
    """A raster that cannot be cut into tiles."""


class BadWeights(BackendError):
    """Model weights that are missing, damaged or of another kind."""


class LabelStudioError(BackendError):
    """Label Studio is down, refuses, or answers nonsense."""


class LabelStudioDenied(LabelStudioError):
    """The token is missing, wrong or expired."""


class TrainingError(BackendError):
    """Nothing to learn from, or the run failed."""


class ExportError(BackendError):
    """Annotations that cannot become features."""


class Busy(BackendError):
    """More is asked at once than can be answered in time; the same may be asked again soon."""


class RegistryError(BackendError):
    """The model registry does not answer, or refuses."""


class UnknownVersion(BackendError):
    """A model version that the registry does not hold."""
