"""An adapter is pushed to the hub and loaded again. A local server answers the necessary part of the hub's HTTP API."""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

pytest.importorskip("peft")
COMMIT = "0" * 40
SCRIPT = """
import sys, warnings
sys.path.insert(0, sys.argv[1])
import torch
from models import MODELS, random_states, tokens
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
import s0kernels.peft

if sys.argv[2] == "push":
    base = MODELS["qwen"]()
    base.push_to_hub("user/base")
    base.name_or_path = "user/base"
    model = get_peft_model(base, s0kernels.peft.S0PeftConfig(task_type="CAUSAL_LM", scale=0.5))
    states = random_states(model)
    for layer in (m for m in model.modules() if isinstance(m, s0kernels.peft.S0Layer)):
        layer.state("default").data.copy_(states[layer.mixer.layer_idx][0])
    model.push_to_hub("user/repo")
    models = [model]
else:
    models = [PeftModel.from_pretrained(MODELS["qwen"](), "user/repo")]
    models.append(AutoPeftModelForCausalLM.from_pretrained("user/repo"))
for model in models:
    with torch.no_grad():
        print("logits", model.eval()(tokens(1, 9)).logits.double().sum().item().hex())
"""


class Hub(BaseHTTPRequestHandler):
    """Repositories in memory, with one commit each. All files are sent inline, without large-file storage."""

    files: dict[str, dict[str, bytes]]

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path == "/api/repos/create":
            name = "{organization}/{name}".format(**json.loads(body))
            self.files.setdefault(name, {})
            self._answer({"url": f"http://{self.headers['Host']}/{name}", "id": name})
        elif self.path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            self._answer(
                {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
            )
        elif match := re.fullmatch(r"/api/models/(\w+/\w+)/commit/main", self.path):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[match[1]][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self._answer(
                {"commitUrl": f"http://{self.headers['Host']}/{match[1]}/commit/{COMMIT}", "commitOid": COMMIT}
            )
        else:
            self.send_error(404, self.path)

    def do_GET(self):
        resolved = re.fullmatch(r"/(\w+/\w+)/resolve/\w+/([\w.]+)", self.path.partition("?")[0])
        if resolved is None:
            repository = re.match(r"/api/models/(\w+/\w+)", self.path)
            if repository and repository[1] in self.files:
                siblings = [{"rfilename": name} for name in self.files[repository[1]]]
                self._answer({"id": repository[1], "sha": COMMIT, "siblings": siblings})
            else:
                self.send_error(404, self.path)
            return
        content = self.files.get(resolved[1], {}).get(resolved[2])
        if content is None:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound" if resolved[1] in self.files else "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self._answer(content)

    do_HEAD = do_GET

    def _answer(self, content: dict | bytes) -> None:
        raw = isinstance(content, bytes)
        body = content if raw else json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/octet-stream" if raw else "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.mark.slow
def test_to_the_hub_and_back(tmp_path):
    hub = type("Repositories", (Hub,), {"files": {}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path),
        "HF_TOKEN": "hf_stand_in",
        "HF_HUB_OFFLINE": "0",
    }
    try:
        found = [
            subprocess.run(
                [sys.executable, "-c", SCRIPT, str(Path(__file__).parent), what],
                capture_output=True,
                text=True,
                env=environment,
            )
            for what in ("push", "load")
        ]
    finally:
        server.shutdown()
        server.server_close()
    for each in found:
        assert each.returncode == 0, each.stderr[-3000:]
    assert set(hub.files["user/repo"]) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    pushed, *loaded = [line for each in found for line in each.stdout.splitlines() if line.startswith("logits")]
    assert loaded == [pushed, pushed]
