"""A stand-in for the Python interpreter that has the libraries imported already.

Importing torch, Lightning and timm takes longer than most tests. `python()` names an executable: it runs
a script as `sys.executable` does, with its own arguments, folder, environment, streams and exit code, in a fork of a
process in which the libraries are imported. Scripts that start `sys.executable` start it, too.
"""

import gc
import importlib
import json
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from functools import cache
from pathlib import Path

LIBRARIES = """torch torchvision.transforms.v2 lightning timm peft hydra omegaconf matplotlib.pyplot torchmetrics scipy
    safetensors.torch rich pydantic PIL.Image tensorboard torch.utils.tensorboard filelock""".split()


@cache
def python() -> str:
    """The path of the executable; the first call starts the process that forks, which ends when the caller does."""
    if sys.platform != "linux":  # elsewhere libraries may not survive a fork
        return sys.executable
    folder = Path(tempfile.mkdtemp(prefix="warm_"))
    address, executable = folder / "socket", folder / "python"
    executable.write_text(f'#!/bin/sh\nexec "{sys.executable}" -IS "{__file__}" ask "{address}" "$@"\n')
    executable.chmod(0o755)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(address))
        listener.listen(64)
        command = [sys.executable, __file__, "serve", str(listener.fileno()), str(executable)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        # libraries that look for a GPU when they are imported leave forks unusable otherwise
        environment |= {"PYTORCH_NVML_BASED_CUDA_CHECK": "1", "CUDA_VISIBLE_DEVICES": ""}
        python.server = subprocess.Popen(  # kept, for its stdin ends with this process
            command, pass_fds=[listener.fileno()], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, env=environment
        )
    return str(executable)


def ask(address: str, arguments: list[str]) -> int:
    """Runs a script with these arguments in a fork; returns its exit code, negative for a signal."""
    if not arguments or arguments[0].startswith("-"):  # python -c, python -m: an interpreter that has imported nothing
        os.execv(sys.executable, [sys.executable, *arguments])
    request = json.dumps({"arguments": arguments, "cwd": os.getcwd(), "environment": dict(os.environ)}).encode()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(address)
        socket.send_fds(connection, [len(request).to_bytes(8, "big")], [0, 1, 2])
        connection.sendall(request)
        answer = connection.recv(16)
    return int(answer) if answer else 125  # the process that forks has ended


def serve(listener: socket.socket) -> dict | None:
    """Forks for each request, and returns it in the fork; returns None when the process that started this one ends."""
    for name in LIBRARIES:
        importlib.import_module(name)
    gc.freeze()  # what is imported stays as it is: no fork walks through it
    assert len(os.listdir("/proc/self/task")) == 1, "a thread would be lost in the fork"
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no zombies
    while listener in select.select([listener, sys.stdin], [], [])[0]:
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            return attend(connection)
        connection.close()
    return None


def attend(connection: socket.socket) -> dict:
    """Returns the request in a process of its own; here, tells its exit code, or kills it when who asked is gone."""
    length, streams, *_ = socket.recv_fds(connection, 8, 3)
    with connection.makefile("rb") as file:
        request = json.loads(file.read(int.from_bytes(length, "big")))
    process = os.fork()
    if process == 0:
        os.setsid()
        connection.close()
        for target, stream in enumerate(streams):
            os.dup2(stream, target)
            os.close(stream)
        return request
    for stream in (0, 1, 2, *streams):
        os.close(stream)
    threading.Thread(target=end_with, args=(connection, process), daemon=True).start()
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    connection.sendall(str(code).encode())
    os._exit(0)


def end_with(connection: socket.socket, process: int) -> None:
    """Kills the process and what it started once the connection is closed at the other end."""
    connection.recv(1)
    os.killpg(process, signal.SIGKILL)


def run(request: dict, executable: str) -> None:
    """Runs the script as `python script arguments` does, errors and exit code left to the interpreter."""
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.executable = executable
    sys.argv = request["arguments"]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    if sys.argv[1] == "ask":
        code = ask(sys.argv[2], sys.argv[3:])
        if code < 0:
            os.kill(os.getpid(), -code)
        sys.exit(code)
    request = serve(socket.socket(fileno=int(sys.argv[2])))
    if request:
        run(request, sys.argv[3])
    else:
        shutil.rmtree(Path(sys.argv[3]).parent)
