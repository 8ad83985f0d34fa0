"""Sampling from a server: requests, answers, failures; and `transformers serve` itself."""

import contextlib
import json
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from models import MODELS, tokenizer
from surroundings import ROOT, environment
from test_collect import PROBLEMS, chatting, check
from trainers import trainer

from s0kernels import S0Config, S0Trainer
from s0kernels.cli import main
from s0kernels.tuning.sampling import Completion, Row
from s0kernels.tuning.server import Server
from s0kernels.tuning.settings import Sampling

SERVE = ROOT / ".deps" / "serve"


@pytest.fixture
def stand_in(monkeypatch):
    """Start a server. `answer` maps a request to a choice, or to the status of a failure."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    seen, lock, busy = [], threading.Lock(), [0, 0]

    class Handler(BaseHTTPRequestHandler):
        def reply(self, value, status=200):
            body = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self):
            self.reply({"object": "list", "data": [{"id": name, "object": "model"} for name in server.names]})

        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
            with lock:
                seen.append(asked)
                busy[0] += 1
                busy[1] = max(busy)
            try:
                found = server.answer(asked)
            finally:
                with lock:
                    busy[0] -= 1
            if isinstance(found, int):
                self.reply({"error": {"message": "not now"}}, found)
            else:
                choices = [] if found is None else [{"index": 0, "finish_reason": "stop", "text": "", **found}]
                self.reply({"id": "1", "object": "text_completion", "created": 0, "model": "m", "choices": choices})

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.names, server.answer = ["m"], lambda asked: {"text": "yes"}
    server.seen, server.busy, server.url = seen, busy, f"http://127.0.0.1:{server.server_port}/v1"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


ROW = Row("k", 0, "a", [5])


def sample(server, rows=(ROW,), tok=None, **options):
    with contextlib.closing(Server(server.url, None, Sampling(**options), tok or tokenizer())) as source:
        source.rows(9, None, torch.device("cpu"))
        return source.sample(rows)


def test_what_a_server_is_asked(stand_in):
    sample(stand_in, max_new_tokens=7, temperature=0.3, top_p=0.5, stop=["x"], top_k=3)
    (asked,) = stand_in.seen
    seed = asked["seed"]
    assert asked == {
        "seed": seed,
        **{"model": "m", "prompt": "a", "max_tokens": 7, "temperature": 0.3, "top_p": 0.5, "stop": ["x"], "top_k": 3},
    }
    sample(stand_in, [Row("k", i, "a", [5]) for i in range(3)])
    assert len({asked["seed"] for asked in stand_in.seen}) == 3
    assert seed in {asked["seed"] for asked in stand_in.seen[1:]}
    assert not {"stop", "top_k"} & set(stand_in.seen[-1])


def test_what_is_made_of_an_answer(stand_in):
    for choice, options, expected in (
        ({"text": "ab"}, {}, Completion("ab", True)),
        ({"text": "ab", "finish_reason": "length"}, {}, Completion("ab", False)),
        ({"text": "ab", "stop_reason": None}, {"stop": ["x"]}, Completion("ab", True)),
        ({"text": "ab", "stop_reason": "x"}, {"stop": ["x"]}, Completion("ab", False)),
        ({"text": "ab", "matched_stop": 151645}, {"stop": ["x"]}, Completion("ab", True)),
        ({"text": "ab", "matched_stop": "x"}, {"stop": ["x"]}, Completion("ab", False)),
        ({"text": "ab"}, {"stop": ["x"]}, Completion("ab", False)),
        ({"text": "abxc", "stop_reason": None}, {"stop": ["x"]}, Completion("ab", False)),
    ):
        stand_in.answer = lambda asked, choice=choice: choice
        assert sample(stand_in, **options) == [expected]


def test_many_requests_at_a_time_and_in_order(stand_in):
    def answer(asked):
        time.sleep(0.2)
        return {"text": asked["prompt"] + "!"}

    stand_in.answer = answer
    rows = [Row(str(i), 0, f"p{i}", [5]) for i in range(40)]
    assert [completion.text for completion in sample(stand_in, rows)] == [f"p{i}!" for i in range(40)]
    assert stand_in.busy[1] > 10


def test_what_fails_is_tried_again_so_often(stand_in, monkeypatch):
    monkeypatch.setattr("s0kernels.tuning.server._RETRIES", 2)
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    stand_in.answer = lambda asked: 503 if len(stand_in.seen) < 3 else {"text": "at last"}
    assert sample(stand_in)[0].text == "at last"
    stand_in.seen.clear()
    stand_in.answer = lambda asked: 500
    with pytest.raises(RuntimeError, match=f"the server {stand_in.url} does not answer problem 'k': .*not now"):
        sample(stand_in)
    assert len(stand_in.seen) == 3
    stand_in.seen.clear()
    stand_in.answer = lambda asked: 404
    with pytest.raises(RuntimeError, match="does not answer problem 'k'"):
        sample(stand_in)
    assert len(stand_in.seen) == 1, "what does not pass is not tried again"
    stand_in.answer = lambda asked: None
    with pytest.raises(RuntimeError, match="sent no choice for problem 'k'"):
        sample(stand_in)


def test_a_begin_token_is_not_sent_twice(stand_in):
    from tokenizers.processors import TemplateProcessing

    tok = tokenizer()
    tok.bos_token = "<eos>"
    row = Row("k", 0, "<eos>Hi", [5])
    sample(stand_in, [row], tok)
    tok.backend_tokenizer.post_processor = TemplateProcessing("<eos> $A", special_tokens=[("<eos>", tok.bos_token_id)])
    sample(stand_in, [row], tok)
    assert [asked["prompt"] for asked in stand_in.seen] == ["<eos>Hi", "Hi"]


def test_collecting_from_a_server(stand_in, tmp_path, monkeypatch):
    one = S0Trainer(MODELS["qwen"](), chatting(), S0Config())
    one.model.forward = lambda *_, **__: pytest.fail("the server is to sample")
    stand_in.answer = lambda asked: {"text": asked["prompt"][-16:]}
    problems = [{"messages": [{"role": "user", "content": f"{i}"}]} for i in range(20)]
    out, options = tmp_path / "found.jsonl", {"samples": 2, "solutions": 5, "progress": False, "rows": 4}
    right = lambda problem, answer: int(problem["messages"][0]["content"]) % 2 == 0  # noqa: E731
    found = one.collect(problems, right, server=stand_in.url, out=out, **options)
    assert [record["id"] for record in found] == [0, 2, 4, 6, 8]
    assert found[0]["completion"] == "<eos><assistant>", "without a thought"
    assert found[0]["ended"]
    many = len(stand_in.seen)
    assert many < 40, "it stops when it is decided"
    assert one.collect(problems, right, server=stand_in.url, out=out, **options) == found
    assert len(stand_in.seen) == many
    stand_in.names = ["other"]
    with pytest.raises(ValueError, match="served_model: 'm' there, 'other' here"):
        one.collect(problems, right, server=stand_in.url, out=out, **options)


def test_mistakes_about_servers(stand_in, monkeypatch):
    one = trainer()
    monkeypatch.setattr("s0kernels.tuning.server._RETRIES", 0)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    stand_in.names = ["a", "b"]
    for options, error, message in (
        ({"server": "localhost:8000"}, ValueError, "server must be a URL such as http://localhost:8000/v1"),
        ({"server": nobody}, RuntimeError, f"the server {nobody} does not answer: Connection error"),
        ({"server": stand_in.url}, ValueError, r"served_model must name one of the server's models, \['a', 'b'\]"),
        ({"server": stand_in.url, "served_model": 3}, TypeError, "served_model must be a name, got 3"),
        ({"served_model": "a"}, ValueError, "served_model needs server"),
    ):
        with pytest.raises(error, match=message):
            one.collect(PROBLEMS, check, progress=False, **options)
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ImportError, match=r"sampling from a server needs the openai client: .*pip install .*server"):
        one.collect(PROBLEMS, check, server=stand_in.url)


def test_the_command_needs_no_weights(stand_in, tmp_path, capsys, monkeypatch):
    MODELS["qwen"]().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    (tmp_path / "problems.jsonl").write_text("\n".join(json.dumps({**p, "answer": "yes"}) for p in PROBLEMS))
    files = [str(tmp_path / name) for name in ("model", "problems.jsonl", "out.jsonl")]
    assert main(["collect", *files, "--server", stand_in.url, "--solutions", "3", "--samples", "1"]) == 0
    assert capsys.readouterr().out.startswith("3 solutions in ")
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 3
    assert main(["collect", *files, "--served-model", "m"]) == 1
    assert "--served-model needs --server" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(not SERVE.is_dir(), reason="nothing is in .deps/serve; `make test-more` puts it there")
def test_transformers_serve(tmp_path):
    """A server runs a tiny model. Its solutions are right, and some samples of a problem differ."""
    model = shutil.copytree(ROOT / "examples" / "tiny" / "qwen3_5", tmp_path / "model")
    settings = json.loads((model / "generation_config.json").read_text())
    (model / "generation_config.json").write_text(json.dumps({**settings, "do_sample": True}))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [shutil.which("transformers", path=str(ROOT / ".venv" / "bin")) or "transformers", "serve", str(model)]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    with open(tmp_path / "log", "w") as log:
        serving = subprocess.Popen(command, stdout=log, stderr=log, env={**environment(SERVE), "OMP_NUM_THREADS": "1"})
    try:
        for _ in range(240):
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health"):
                break
            assert serving.poll() is None, (tmp_path / "log").read_text()[-2000:]
            time.sleep(0.5)
        one = S0Trainer.from_pretrained(str(model))
        asked = [
            {"id": i, "prompt": f'def add_box(n):\n    """Return n plus {i}."""\n', "answer": f"return n + {i}"}
            for i in range(20, 30)
        ]
        answers = {}

        def right(problem, answer):
            answers.setdefault(problem["id"], set()).add(answer)
            return answer.strip() == problem["answer"]

        url, options = f"http://127.0.0.1:{port}/v1", {"samples": 6, "max_new_tokens": 20, "progress": False}
        found = one.collect(asked, right, server=url, **options)
        assert len(found) > 3
        assert all(record["ended"] for record in found)
        assert any(len(texts) > 1 for texts in answers.values()), "it samples"
        one.train(found, progress=False)
    finally:
        serving.terminate()
        serving.wait()
