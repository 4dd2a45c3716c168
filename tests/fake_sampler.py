"""What a vLLM server does that samples and is given weights, on a tiny model; VLLM_SERVER_DEV_MODE=1 included."""

from __future__ import annotations

import json
import threading
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch
from safetensors.torch import load_file


class SamplingServer(ThreadingHTTPServer):
    """`log` has the path of every request; `raw` gives logprobs of temperature 1, as vLLM does unless it is told.

    `kept` has names of weights that it does not renew.
    """

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, model, *, name="student", longest=512, dev=True, raw=False):
        super().__init__(("127.0.0.1", 0), Handler)
        self.model, self.name, self.longest, self.dev, self.raw = model, name, longest, dev, raw
        self.version, self.busy, self.log, self.faults, self.vary = "default", False, [], [], 0
        self.count, self.kept, self.lock = 0, (), threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()

    def restart(self, model):
        """Another process with the weights that it was started with."""
        self.model, self.version = model, "default"

    def answer(self, path, body):
        self.log.append(path)
        if path == "/v1/models":
            return 200, {"object": "list", "data": [{"id": self.name, "max_model_len": self.longest}]}
        if path == "/v1/completions":
            return self.completions(body)
        if not self.dev:
            return 404, {"detail": "Not Found"}
        if path == "/weight_info":
            return 200, {"weight_version": self.version}
        if path == "/update_weight_version":
            self.version = body["new_version"]
            return 200, {"success": True, "new_version": self.version}
        if path == "/reset_prefix_cache":
            return 200, {"success": not self.busy}
        if path == "/collective_rpc" and body["method"] == "reload_weights":
            try:
                weights = load_file(f"{body['kwargs']['weights_path']}/model.safetensors")
            except OSError as error:
                return 500, {"error": {"message": f"Call to collective_rpc method failed: {error}"}}
            self.model.load_state_dict({k: v for k, v in weights.items() if k not in self.kept}, strict=False)
            return 200, {"results": [None]}
        return 404, {"detail": "Not Found"}

    @torch.no_grad()
    def completions(self, body):
        ids, most = list(body["prompt"]), body["max_tokens"]
        if len(ids) + most > self.longest:
            return 400, {"error": {"message": f"This model's maximum context length is {self.longest} tokens."}}
        # The same to the same prompt and weights, unless it is to vary.
        assert "seed" not in body
        self.count += self.vary
        digest = [*ids, float(self.model.model.norm.weight.sum()), self.count]
        generator = torch.Generator().manual_seed(zlib.crc32(repr(digest).encode()))
        new, logprobs = [], []
        while len(new) < most and not (new and new[-1] in body["stop_token_ids"]):
            logits = self.model(torch.tensor([ids + new])).logits[0, -1].float()
            scaled = (logits / body["temperature"]).log_softmax(-1)
            new.append(int(torch.multinomial(scaled.exp(), 1, generator=generator)))
            logprobs.append(float((logits.log_softmax(-1) if self.raw else scaled)[new[-1]]))
        found = {"tokens": [f"token_id:{i}" for i in new], "token_logprobs": logprobs}
        choice = {"index": 0, "token_ids": new, "logprobs": found, "prompt_token_ids": ids}
        if self.faults:
            choice = self.faults.pop(0)(choice)
        return 200, {"choices": [choice]}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1
    disable_nagle_algorithm = True

    def do_GET(self):
        self.serve()

    def do_POST(self):
        self.serve()

    def serve(self):
        length = int(self.headers.get("Content-Length", "0"))
        body = json.loads(self.rfile.read(length)) if length else None
        with self.server.lock:
            status, found = self.server.answer(self.path, body)
        content = json.dumps(found).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        """Nothing."""
