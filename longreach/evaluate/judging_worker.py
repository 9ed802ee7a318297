"""A process that judges answers for `longreach.evaluate.judging`, one at a time, and may be killed at any moment.

It loads neither torch nor a model: only the module of the task it is sent. Questions come as pickles from the process that
started it; verdicts go back as JSON, so that whatever a judge does here, nothing of it is executed there.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import pickle
import sys
from multiprocessing.connection import Connection

GRACE_S = 5.0
"""Seconds beyond its time after which this process ends itself, should nobody be left to kill it."""


def main(handle: int) -> None:
    """Serve the connection of this file descriptor until it is closed.

    A question is (name of the task, the task or None if it was sent before, problem, reply, seconds), each of the middle
    three pickled; the answers are `{"loaded": true}`, then `{"verdict": …}` or `{"failed": why}`.
    """
    os.set_inheritable(handle, False)  # no program that a judge starts may speak here
    connection = Connection(handle)
    tasks = {}
    with contextlib.suppress(EOFError, OSError):
        connection.send_bytes(b'{"ready": true}')
        while True:
            name, task, question, time_s = pickle.loads(connection.recv_bytes())
            answer: dict[str, object]
            try:
                if task is not None:
                    tasks[name] = pickle.loads(task)
                connection.send_bytes(b'{"loaded": true}')
                # Its thread runs without the interpreter's lock, which a regular expression may hold for ever.
                faulthandler.dump_traceback_later(time_s + GRACE_S, exit=True, file=sys.stderr)
                problem, reply = pickle.loads(question)
                reward, is_right, why = tasks[name].verify(problem, reply)
                answer = {"verdict": [float(reward), bool(is_right), str(why)]}
            except Exception as error:  # whatever a judge does wrong is said of its answer alone
                answer = {"failed": f"{type(error).__name__}: {error}"}
            faulthandler.cancel_dump_traceback_later()
            connection.send_bytes(json.dumps(answer).encode())
