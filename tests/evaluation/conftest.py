"""Reports write blank pictures, since drawing takes most of their time; tests marked `draws` really draw."""

from __future__ import annotations

from typing import Any, BinaryIO

import cv2
import numpy as np
import pytest

BLANK = cv2.imencode(".png", np.full((8, 8), 255, np.uint8))[1].tobytes()


@pytest.fixture(autouse=True)
def _blank_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    def savefig(self: Any, file: BinaryIO, **_: Any) -> None:
        file.write(BLANK)

    if not request.node.get_closest_marker("draws"):
        monkeypatch.setattr("matplotlib.figure.Figure.savefig", savefig)
        monkeypatch.setattr("matplotlib.backends.backend_agg.FigureCanvasAgg.draw", lambda self: self.get_renderer())
