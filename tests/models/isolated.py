"""Running a function in a process of its own, so that a signal or a hang there ends no test run."""

from __future__ import annotations

import faulthandler
import json
import os
import resource
import signal
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import torch

CPU_SECONDS, SECONDS = 120, 600  # of a child; the second is for a machine that is busy


def isolated(run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `run` returns, through JSON, from a forked process; {"fatal": why} where there is none."""
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python's warning that threads of the parent are not forked
        child = os.fork()
    if child == 0:
        os.close(reading)
        _answer(run, writing)
    os.close(writing)
    with os.fdopen(reading, encoding="utf-8") as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        late = number in (signal.SIGALRM, signal.SIGXCPU)
        return {"fatal": "no answer in time" if late else f"ended by {signal.Signals(number).name}"}
    return json.loads(text) if text else {"fatal": f"exit status {os.WEXITSTATUS(status)}"}


def _answer(run: Callable[[], dict[str, Any]], writing: int) -> None:
    """The child's life."""
    try:
        faulthandler.disable()  # pytest's, which tells of signals at length
        signal.alarm(SECONDS)
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 5))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        torch.set_num_threads(1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            answer = run()
    except BaseException:
        answer = {"fatal": traceback.format_exc(limit=-3)}
    with os.fdopen(writing, "w", encoding="utf-8") as pipe:
        json.dump(answer, pipe)
    os._exit(0)
