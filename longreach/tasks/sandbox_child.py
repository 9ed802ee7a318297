"""The other side of `longreach.tasks.sandbox`: a small process that forks one confined process for each program.

    nursery     waits for orders; started once, with an empty environment and what programs often import already loaded
      guardian  one for each program: makes the namespaces, holds the deadline, reports, and leaves nothing behind
        init    process 1 of the program's own process namespace: when it ends, the kernel kills all that is left there
          program

Without namespaces the guardian forks the program itself, which then cannot start any process: there is nothing to escape to.
A program is forked, not executed, so it begins within a millisecond; it sees no memory of other programs, since their sources
travel past the nursery as open files.

Started as `python -P -s -S -B -c …` by `Sandbox`; stands on the standard library and `confine` alone.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import select
import shutil
import signal
import socket
import sys
import tempfile
import time
from typing import Any, NoReturn

from longreach.tasks import confine

LOOK_S = 0.05
"""How often the size of a scratch folder is looked at where the kernel does not bound it."""

NUM_FILES = 1024
"""Files and folders in a scratch folder."""


class Nursery:
    """What all guardians need to know.

    Attributes:
        proc: /proc, opened before it was left; None without namespaces.
        paths: what programs may read.
        scratches: where scratch folders are made, without namespaces.
    """

    def __init__(self, with_namespaces: bool, packages: list[str], base: str, scratches: str):
        self.has_namespaces = with_namespaces
        self.scratches = scratches
        self.paths = confine.system_paths(packages)
        self.proc: int | None = None
        if with_namespaces:
            self._enter_namespaces(base)

    def _enter_namespaces(self, base: str) -> None:
        self.proc = os.open("/proc", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        uid, gid = os.geteuid(), os.getegid()
        own = confine.NEW_MOUNTS | confine.NEW_NETWORK | confine.NEW_IPC | confine.NEW_NAMES
        if uid == 0:
            confine.unshare(own)
        else:
            confine.unshare(own | confine.NEW_USERS)
            confine.map_user(self.proc, uid, gid, inside=0)
        confine.new_root(self.paths, base)
        if uid == 0:
            os.setgroups([])
            os.setresgid(confine.NOBODY, confine.NOBODY, confine.NOBODY)
            os.setresuid(confine.NOBODY, confine.NOBODY, confine.NOBODY)
            # A change of user hides a process even from itself, and the maps of its children are to be written.
            confine.set_dumpable(True)

    def serve(self, orders: socket.socket) -> NoReturn:
        """Fork a guardian for every order until the other side is gone."""
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel buries them
        gc.collect()
        gc.freeze()  # memory that a collector never touches stays shared with every program
        orders.send(b"{}")
        while True:
            message, files, _, _ = socket.recv_fds(orders, 4096, 5)
            if not message:
                os._exit(0)
            if os.fork() == 0:
                orders.close()
                guardian = Guardian(self, json.loads(message), files)
                try:
                    guardian.run()
                finally:
                    os._exit(0)
            for file in files:
                os.close(file)


class Guardian:
    """One program from its start until nothing of it is left.

    Does not die with the nursery: it ends with its program, or when the process that wanted the outcome is gone.
    """

    def __init__(self, nursery: Nursery, limits: dict[str, Any], files: list[int]):
        self.nursery = nursery
        self.limits = limits
        self.source, self.stdin, self.stdout, self.stderr, control = files
        self.control = socket.socket(fileno=control)
        self.scratch = "/tmp"

    def run(self) -> None:
        """Send one message: `status` as of `waitpid`, `cpu_s`, `seconds`, `stopped` (why it was ended), `error`."""
        told: dict[str, Any] = {"status": None, "cpu_s": 0.0, "seconds": 0.0, "stopped": None, "error": None}
        try:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            self._prepare()
            told.update(self._watch())
        except (OSError, MemoryError) as error:
            told["error"] = str(error) or type(error).__name__
        finally:
            if not self.nursery.has_namespaces and self.scratch != "/tmp":
                os.chmod(self.scratch, 0o700)
                shutil.rmtree(self.scratch, ignore_errors=True)
        self.control.send(json.dumps(told).encode())

    def _prepare(self) -> None:
        if self.nursery.has_namespaces:
            assert self.nursery.proc is not None
            uid, gid = os.geteuid(), os.getegid()
            confine.unshare(confine.NEW_USERS | confine.NEW_MOUNTS | confine.NEW_PIDS)
            confine.map_user(self.nursery.proc, uid, gid, inside=confine.NOBODY)
            confine.mount_scratch("/tmp", self.limits["files_mib"], NUM_FILES)
        else:
            self.scratch = tempfile.mkdtemp(prefix="longreach-", dir=self.nursery.scratches)

    def _watch(self) -> dict[str, Any]:
        begin = time.monotonic()
        report, report_to = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.close(report)
                if self.nursery.has_namespaces:
                    self._init(report_to)
                self._program(report_to)
            finally:
                os._exit(1)
        os.close(report_to)
        for file in (self.source, self.stdin, self.stdout, self.stderr):
            os.close(file)
        stopped = self._until_over(child, begin + self.limits["wall_s"])
        if stopped:
            os.kill(child, signal.SIGKILL)
        # Of process 1 of a namespace this returns when everything in the namespace is gone.
        _, status, usage = os.wait4(child, 0)
        told: dict[str, Any] = {"status": status, "stopped": stopped, "seconds": time.monotonic() - begin}
        told["cpu_s"] = usage.ru_utime + usage.ru_stime
        with open(report, "rb") as file:
            for line in file.read().splitlines():
                told.update(json.loads(line))
        if stopped:
            told["status"] = signal.SIGKILL
        return told

    def _until_over(self, child: int, deadline: float) -> str | None:
        """Wait for the child's end; if it has to be ended, why."""
        poll = select.poll()
        handle = os.pidfd_open(child)
        poll.register(handle, select.POLLIN)
        poll.register(self.control.fileno(), select.POLLIN | select.POLLHUP | select.POLLRDHUP)
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                return "wall"
            if not self.nursery.has_namespaces:
                if self._scratch_bytes() > self.limits["files_mib"] << 20:
                    return "files"
                left = min(left, LOOK_S)
            ready = {file for file, _ in poll.poll(left * 1000)}
            if handle in ready:
                return None
            if self.control.fileno() in ready:
                return "told"

    def _scratch_bytes(self) -> int:
        """What the folder takes up; a folder with too many files counts as too large. It has no folders in it."""
        total = 0
        try:
            with os.scandir(self.scratch) as entries:
                for number, entry in enumerate(entries):
                    if number >= NUM_FILES:
                        return 1 << 60
                    total += entry.stat(follow_symlinks=False).st_blocks * 512
        except OSError:  # a file that has just been removed, or a folder that the program removed
            pass
        return total

    def _init(self, report: int) -> NoReturn:
        """Be process 1: wait for the program, bury orphans, tell how it ended."""
        confine.die_with_parent()
        confine.set_dumpable(False)
        self.control.close()
        program = os.fork()
        if program == 0:
            self._program(report)
        for file in (self.source, self.stdin, self.stdout, self.stderr):
            os.close(file)
        while True:
            ended, status, usage = os.wait4(-1, 0)
            if ended == program:
                cpu_s = usage.ru_utime + usage.ru_stime
                os.write(report, json.dumps({"status": status, "cpu_s": cpu_s}).encode() + b"\n")
                os._exit(0)

    def _program(self, report: int) -> NoReturn:
        """Give up all rights, then be the program."""
        try:
            os.setsid()
            if not self.nursery.has_namespaces:
                confine.die_with_parent()
            for number, file in enumerate((self.stdin, self.stdout, self.stderr)):
                os.dup2(file, number)
            with open(self.source, encoding="utf-8", errors="surrogatepass", newline="") as file:
                source = file.read()
            os.chdir(self.scratch)
            self._give_up_rights()
        except (OSError, ValueError) as error:
            os.write(report, json.dumps({"error": str(error)}).encode() + b"\n")
            os._exit(1)
        os.closerange(3, 1 << 20)
        _execute(source)

    def _give_up_rights(self) -> None:
        limits = self.limits
        inside = self.nursery.has_namespaces
        # Guardian and init count as well.
        processes = limits["processes"] + 2 if inside else None
        confine.drop_privileges()
        if confine.landlock_version():
            confine.restrict_files(self.nursery.paths, self.scratch, with_folders=inside)
        confine.limit_resources(limits["cpu_s"], limits["memory_mib"], limits["files_mib"], processes)
        confine.filter_calls(
            may_start=limits["processes"] > 1, only_signal=None if inside else os.getpid(), with_properties=inside
        )


def _execute(source: str) -> NoReturn:
    """Run the source as `python program.py` would, exit code and traceback included."""
    import atexit
    import threading
    import traceback
    import types

    for name in [name for name in sys.modules if name.partition(".")[0] == "longreach"]:
        del sys.modules[name]

    for name in ("stdin", "stdout", "stderr"):
        number = ("stdin", "stdout", "stderr").index(name)
        mode, errors = ("r", "surrogateescape") if number == 0 else ("w", "backslashreplace")
        stream = open(number, mode, encoding="utf-8", errors=errors, closefd=False)  # noqa: SIM115 (lives as long as we)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    main = types.ModuleType("__main__")
    sys.modules["__main__"] = main
    sys.argv = ["program.py"]
    code = 0
    try:
        exec(compile(source, "program.py", "exec", dont_inherit=True), main.__dict__)
    except SystemExit as error:
        if isinstance(error.code, int):
            code = error.code & 0xFF
        elif error.code is not None:
            print(error.code, file=sys.stderr)
            code = 1
    except BaseException as error:
        code = 1
        behind = error.__traceback__.tb_next if error.__traceback__ else None  # this frame is none of the program's
        traceback.print_exception(type(error), error, behind)
    try:
        threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue] (as the interpreter does at its end)
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:  # a closed stream, a handler that fails: as the interpreter says
        code = code or 120
    os._exit(code)


def main() -> NoReturn:
    """Order of work: the socket's number and the settings are the arguments."""
    orders = socket.socket(fileno=int(sys.argv[1]))
    settings = json.loads(sys.argv[2])
    try:
        # Where memory runs out, this process and its children are to be killed before the one that trains.
        with open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
            file.write("1000")
    except OSError:
        pass
    try:
        sys.path[:] = [*(path for path in sys.path if path not in settings["hidden"]), *settings["packages"]]
        for name in settings["preload"]:
            importlib.import_module(name)
        exec(settings["warm"], {})
        os.environ.clear()
        nursery = Nursery(*(settings[name] for name in ("with_namespaces", "packages", "base", "scratches")))
    except Exception as error:  # whatever the modules raise that are loaded
        orders.send(json.dumps({"error": str(error)[:2000]}).encode())
        os._exit(1)
    nursery.serve(orders)
