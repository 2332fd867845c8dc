"""`collie` and `python` as a shell finds them, without paying for the imports each time.

A server imports everything once. Two small programs, first in PATH, hand it their arguments, environment, folder and
streams, and it forks a process that runs with them. What a command starts in its turn is started as ever.

    python preloaded.py SOCKET FOLDER      serve, with the two programs in FOLDER
"""

from __future__ import annotations

import array
import gc
import json
import os
import signal
import socket
import sys
import traceback
import types
from pathlib import Path
from typing import Any, NoReturn

CLIENT = """#!{python} -IS
import array, json, os, signal, socket, sys
request = json.dumps({{"name": "{name}", "argv": sys.argv[1:], "cwd": os.getcwd(), "env": dict(os.environ)}}).encode()
with socket.socket(socket.AF_UNIX) as server:
    server.connect("{path}")
    streams = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0, 1, 2]))
    server.sendmsg([len(request).to_bytes(4, "big")], [streams])
    server.sendall(request)
    child = int(server.recv(16))
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: os.kill(child, number))
    sys.exit(int(server.recv(16) or 1))
"""


def main(path: str, folder: str) -> NoReturn:
    for name in ("collie", "python"):
        program = Path(folder) / name
        program.write_text(CLIENT.format(python=sys.executable, name=name, path=path))
        program.chmod(0o755)
    _import_everything()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()
        while True:
            connection, _ = server.accept()
            if os.fork() == 0:
                server.close()
                _answer(connection)
            connection.close()
            _reap()


def _import_everything() -> None:
    import torch
    import transformers  # noqa: F401

    for name in ("collie_core.cli", "collie_core.loop", "deepspeed", "peft", "datasets", "fastapi", "uvicorn"):
        __import__(name)
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # see the zygote of collie-testkit


def _reap() -> None:
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


def _answer(connection: socket.socket) -> NoReturn:
    """In a process of its own: run the command in another one, and say how it ended."""
    length, ancillary, _, _ = connection.recvmsg(4, socket.CMSG_SPACE(3 * 4))
    streams = array.array("i")
    streams.frombytes(ancillary[0][2])
    text = b""
    while len(text) < int.from_bytes(length, "big"):
        text += connection.recv(1 << 20)
    child = os.fork()
    if child == 0:
        connection.close()
        _run(json.loads(text), streams)
    for stream in streams:
        os.close(stream)
    connection.sendall(str(child).encode())
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    connection.sendall(str(code if code >= 0 else 128 - code).encode())
    os._exit(0)


def _run(request: dict[str, Any], streams: array.array[int]) -> NoReturn:
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    sys.stdin, sys.stdout = os.fdopen(0, closefd=False), os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    sys.path[:0] = [entry for entry in request["env"].get("PYTHONPATH", "").split(os.pathsep) if entry]
    code = 1
    try:
        code = _call(request["name"], request["argv"])
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:  # noqa: BLE001  (as the interpreter does)
        traceback.print_exc()
    finally:
        _leave(code)


def _call(name: str, argv: list[str]) -> int:
    sys.argv = [name, *argv]
    if name == "collie":
        from collie_core.cli import main as collie

        return collie(argv)
    if argv[0] == "-c":
        sys.argv, text = argv[:1], argv[1]
        sys.path.insert(0, "")
    else:  # a file
        sys.argv, text = argv, Path(argv[0]).read_text()
        sys.path.insert(0, str(Path(argv[0]).resolve().parent))
    module = sys.modules["__main__"] = types.ModuleType("__main__")
    module.__file__ = argv[0]
    exec(compile(text, argv[0], "exec"), module.__dict__)
    return 0


def _leave(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main(*sys.argv[1:])
