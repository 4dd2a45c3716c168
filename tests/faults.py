"""A teacher's server that does what real ones do when something is wrong, on a plan."""

from __future__ import annotations

import copy
import json
import random
import socket
import threading
import time
from collections import Counter
from contextlib import contextmanager

from fake_server import Handler, TeacherServer

#: What can go wrong with one answer; `limits` and `errors` before it is made, the others with the answer itself.
FAULTS = (
    "429",
    "429 in 0.05 s",
    "500",
    "503",
    "no answer",
    "cut body",
    "slow",
    "broken JSON",
    "NaN",
    "positive",
    "one row short",
    "shifted",
    "other ids",
    "sum above 1",
)


class Plan:
    """Which fault the next scoring request gets: first those of a list, then some by chance.

    `log` has one entry for each fault: its name and the ids of the request.
    """

    def __init__(self, faults=(), rate=0.0, names=FAULTS, seed=0, slow=0.6):
        self.faults, self.rate, self.names, self.slow = list(faults), rate, names, slow
        self.random, self.lock = random.Random(seed), threading.Lock()
        self.log: list[str] = []
        self.answered: Counter[tuple[int, ...]] = Counter()
        self.seen_keys: set[str | None] = set()

    def next(self):
        with self.lock:
            if self.faults:
                fault = self.faults.pop(0)
            else:
                fault = self.random.choice(self.names) if self.random.random() < self.rate else None
            if fault:
                self.log.append(fault)
            return fault


class FaultyServer(TeacherServer):
    plan: Plan

    def handler(self):
        return FaultyHandler


class FaultyHandler(Handler):
    server: FaultyServer

    def reply(self, status, found, headers):
        plan = self.server.plan
        if self.command != "POST" or status != 200:
            super().reply(status, found, headers)
            return
        fault = plan.next()
        plan.seen_keys.add(self.headers.get("Authorization"))
        if fault in ("429", "500", "503"):
            said = f"{fault} of {self.headers.get('Authorization')}"
            super().reply(int(fault), {"error": {"message": said}}, {})
        elif fault == "429 in 0.05 s":
            super().reply(429, {"error": {"message": "slow down"}}, {"Retry-After": "0.05"})
        elif fault == "no answer":
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
        elif fault in ("cut body", "broken JSON"):
            content = json.dumps(found).encode()
            self.send_response(200)
            length = len(content) if fault == "cut body" else len(content) // 2
            self.send_header("Content-Length", str(length))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            if fault == "cut body":
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
        else:
            if fault == "slow":
                time.sleep(plan.slow)
            elif fault is not None:
                found = damaged(found, fault)
            content = json.dumps(found).encode()  # NaN may be in it
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
            self.server.answered += 1


def damaged(found, fault):
    """An answer of any of the protocols with something wrong in its rows."""
    found = copy.deepcopy(found)
    if "meta_info" in found:
        if fault == "other ids":  # not a neighbour's row, which may be of the same token
            rows = found["meta_info"]["input_token_logprobs"]
            rows[len(rows) // 2][1] += 1
            return found
        for name in ("input_token_logprobs", "input_top_logprobs"):
            if name in found["meta_info"]:
                found["meta_info"][name] = rows_of(found["meta_info"][name], fault, lambda row: row)
        if fault == "sum above 1":
            found["meta_info"]["input_token_logprobs"][-1][0] = 1.0
        return found
    choice = found["choices"][0]
    if choice.get("prompt_logprobs") is not None:
        if fault == "other ids":
            choice["prompt_token_ids"] = [i + 1 for i in choice["prompt_token_ids"]]
        else:
            choice["prompt_logprobs"] = rows_of(choice["prompt_logprobs"], fault, list)
        return found
    given = choice["logprobs"]
    if fault in ("other ids", "sum above 1"):
        given["tokens"] = [*given["tokens"][1:], given["tokens"][0]]
        return found
    for name in ("tokens", "token_logprobs", "top_logprobs") if fault == "one row short" else ("token_logprobs",):
        rows = given[name]
        if fault == "one row short":
            del rows[-2:]
        elif fault == "shifted":
            given[name] = [*rows[1:], -1.0]
        else:
            rows[len(rows) // 2] = float("nan") if fault == "NaN" else 0.5
    return found


def rows_of(rows, fault, keys):
    middle = len(rows) // 2
    if fault == "one row short":
        return rows[:-1]
    if fault == "shifted":
        return [*rows[1:], rows[-1]]
    row = rows[middle]
    if fault == "sum above 1" and isinstance(row, dict) and len(row) == 1:
        row["0"] = {"logprob": -0.01}
    for key in keys(row) if isinstance(row, dict) else range(len(row)):
        entry = row[key]
        value = {"NaN": float("nan"), "positive": 0.5, "sum above 1": -0.01}[fault]
        if isinstance(entry, dict):
            entry["logprob"] = value
        elif isinstance(entry, list):
            entry[0] = value
        else:  # [logprob, id, text]
            row[0] = value
            break
    return rows


@contextmanager
def serving(model, tokenizer, plan=None, **options):
    """A server that runs; faulty where there is a plan."""
    kind = TeacherServer if plan is None else FaultyServer
    server = kind(model, tokenizer, **options)
    server.plan = plan
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.close(patience=2.0)
        thread.join()
