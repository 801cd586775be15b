"""What tests of several modules share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from demo.label_studio import LabelStudioServer, label_studio_venv


@pytest.fixture(scope="session")
def label_studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LabelStudioServer]:
    """A real Label Studio, started once. Tests make their own projects in it."""
    venv = label_studio_venv()
    if venv is None:
        pytest.skip("no Label Studio: `make demo` installs one, or set GEOPRELABEL_LS_VENV to an environment with one")
    with LabelStudioServer(venv, tmp_path_factory.mktemp("label-studio")) as server:
        yield server


@pytest.fixture(scope="module")
def one_torch_thread() -> Iterator[None]:
    """Tests' pictures are so small that more threads only wait for each other."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
