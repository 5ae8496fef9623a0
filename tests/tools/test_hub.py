"""A training that pushes to a hub: what a server that speaks the hub's protocol is given."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from tests.processes import python

TRAINING = """
import sys
from pathlib import Path
from tests.core.test_trainer_mixin import trainer, two

trainer(two(), Path(sys.argv[1]), push_to_hub=True, hub_model_id="me/out", hub_token="hf_x").train()
"""


class Hub(BaseHTTPRequestHandler):
    """Takes every file in a commit, and keeps its path and content."""

    files: dict[str, bytes]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        place, answer = f"http://{self.headers['Host']}/me/out", dict[str, Any]()
        if "/preupload/" in self.path:
            paths = [file["path"] for file in json.loads(body)["files"]]
            answer["files"] = [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            answer = {"commitUrl": f"{place}/commit/1", "commitOid": "1"}
        elif self.path.endswith("/repos/create"):
            answer["url"] = place
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[tuple[str, dict[str, bytes]]]:
    """Its address, and the files that it has."""
    handler = type("Handler", (Hub,), {"files": {}})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", handler.files
        server.shutdown()


def test_every_adapter_is_pushed_in_its_subfolder(hub: tuple[str, dict[str, bytes]], tmp_path: Path) -> None:
    address, files = hub
    variables = {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    python("-c", TRAINING, tmp_path / "out", cwd=Path(__file__).parents[2], **variables)
    wanted = {f"{name}/{file}" for name in ("s", "t") for file in ("adapter_config.json", "adapter_model.safetensors")}
    assert wanted <= files.keys()
    assert "model.safetensors" not in files
    for path in wanted:
        assert files[path] == (tmp_path / "out" / path).read_bytes()
