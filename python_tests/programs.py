"""Programs in processes of their own, in which PyTorch is imported already: that is most of what a fresh one would do.

One interpreter that has imported PyTorch, and nothing of ours, waits beside the tests; for each program it forks a
child, which runs the program as its ``-c`` would. What is read when an interpreter starts or when PyTorch is imported
(PYTHONHASHSEED, MALLOC_ARENA_MAX) cannot be given to such a child, and programs about that need a fresh interpreter.
"""

from __future__ import annotations

import atexit
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

SERVER = """
import json, os, sys
import torch

def program():
    for line in sys.stdin:
        asked = json.loads(line)
        child = os.fork()
        if child == 0:
            for number, path in enumerate((os.devnull, asked["out"], asked["err"])):
                opened = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
                os.dup2(opened, number)
                os.close(opened)
            os.environ.clear()
            os.environ.update(asked["environment"])
            os.chdir(asked["folder"])
            sys.argv[1:] = asked["arguments"]
            torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or torch.get_num_threads()))
            return asked["source"]
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(status, flush=True)
    os._exit(0)

def run(source):
    names = vars(sys.modules["__main__"])
    for name in [name for name in names if not name.startswith("__")]:
        del names[name]
    exec(compile(source, "<string>", "exec"), names)

run(program())
"""

_server: subprocess.Popen[str] | None = None


def ran(
    source: str, *arguments: str, environment: Mapping[str, str] | None = None, timeout: float = 120.0
) -> subprocess.CompletedProcess[str]:
    """What ``python -c source arguments`` gives with this environment, else that of this process."""
    source, environment = textwrap.dedent(source), dict(os.environ if environment is None else environment)
    command = [sys.executable, "-c", source, *arguments]
    if not hasattr(os, "fork"):
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=timeout, check=False)
    server = _waiting(environment)
    assert server.stdin is not None
    assert server.stdout is not None
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        asked = {"source": source, "arguments": arguments, "environment": environment, "folder": str(Path.cwd())}
        server.stdin.write(json.dumps({**asked, "out": str(out), "err": str(err)}) + "\n")
        server.stdin.flush()
        if not select.select([server.stdout], [], [], timeout)[0]:
            _end()
            raise subprocess.TimeoutExpired(command, timeout)
        answer = server.stdout.readline()
        assert answer, "the interpreter that waits for programs has ended"
        return subprocess.CompletedProcess(command, int(answer), out.read_text(), err.read_text())


def ran_file(
    path: Path, *arguments: str, environment: Mapping[str, str] | None = None, timeout: float = 120.0
) -> subprocess.CompletedProcess[str]:
    """What ``python path arguments`` gives."""
    source = f"""
        import runpy, sys
        sys.path.insert(0, {str(path.parent)!r})
        sys.argv[0] = {str(path)!r}
        runpy.run_path({str(path)!r}, run_name="__main__")
    """
    return ran(source, *arguments, environment=environment, timeout=timeout)


def _waiting(environment: Mapping[str, str]) -> subprocess.Popen[str]:
    """The interpreter, begun when it is first needed; a group of processes, which ends as one."""
    global _server
    if _server is None:
        _server = subprocess.Popen(
            [sys.executable, "-c", SERVER], env=dict(environment), text=True, start_new_session=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        atexit.register(_end)
    return _server


def _end() -> None:
    global _server
    if _server is not None:
        with suppress(ProcessLookupError):
            os.killpg(_server.pid, signal.SIGKILL)
        _server.wait()
        _server = None
