"""Run a program that nobody has read, and lose nothing by it: what a model wrote is judged by what it prints.

    outcome = run_python("print(6 * 7)")                       Outcome(stdout="42\\n", reason="ok", …)
    outcomes = run_many([Program(source) for source in sources])

Each program has a process of its own, without network, other processes, the user's files and environment, with bounded CPU
time, wall time, memory, files and output, in a scratch folder that is gone afterwards. How that is done depends on the kernel;
`protections()` says what holds on this machine, and a program is refused where one that was required does not.
`docs/sandbox.md` says what this protects against and what not.

Linux on x86-64 or aarch64 only. The programs see Python's standard library and no other package.
"""

from __future__ import annotations

import atexit
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from longreach.errors import LongreachError

Reason = Literal["ok", "exit", "cpu", "wall", "memory", "output", "files", "signal"]
"""Why a program ended: by itself with code 0 or another; at a limit; killed by a signal.

`memory` is told from the program's own last line of stderr, so it is for people to read, not to rely on.
"""

Protection = Literal["network", "files", "processes"]
PROTECTIONS: tuple[Protection, ...] = ("network", "files", "processes")

WITHOUT = "LONGREACH_SANDBOX_WITHOUT"
"""Environment variable: protections, separated by commas, that a user does without on this machine."""

_GRACE_S = 30.0
"""A guardian that has not reported so long after its deadline is given up: the machine hangs."""

# What small programs mostly import: loaded once, and shared by all of them.
_PRELOADED = (
    "bisect", "collections", "copy", "datetime", "decimal", "fractions", "functools", "hashlib", "heapq", "itertools",
    "json", "math", "operator", "random", "re", "statistics", "string", "threading", "traceback", "types", "typing",
)  # fmt: skip


class SandboxError(LongreachError, RuntimeError):
    """Programs cannot be run here, or not as safely as was required."""


@dataclass(frozen=True)
class Limits:
    """What a program may use.

    Attributes:
        cpu_s: CPU time of each process, whole seconds.
        wall_s: time from start to end.
        memory_mib: address space of each process, the interpreter's own 30 MiB included.
        processes: processes and threads at a time; 1: it starts none.
        files_mib: all files of the scratch folder together, and each single one.
        output_kib: of stdout, and of stderr.
    """

    cpu_s: int = 2
    wall_s: float = 5.0
    memory_mib: int = 512
    processes: int = 1
    files_mib: int = 16
    output_kib: int = 64

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            assert value > 0, f"{name}={value} allows nothing"


@dataclass(frozen=True)
class Program:
    """A program to be run."""

    source: str
    stdin: str = ""
    limits: Limits = field(default_factory=Limits)


@dataclass(frozen=True)
class Outcome:
    """What became of a program.

    Attributes:
        stdout, stderr: at most `output_kib` each, undecodable bytes replaced.
        exit_code: None where it was killed.
        seconds: of wall time. cpu_s: of CPU time, of processes that were waited for.
    """

    stdout: str
    stderr: str
    exit_code: int | None
    reason: Reason
    seconds: float
    cpu_s: float

    @property
    def last_error(self) -> str:
        """The last line of stderr: for a traceback, the exception."""
        lines = self.stderr.strip().splitlines()
        return lines[-1][:200] if lines else ""


class Sandbox:
    """A source of confined processes. `run` may be called from any number of threads.

    Args:
        preload: modules loaded before a program starts. They run unconfined, so they must be trusted.
        warm: Python executed behind that, for what these modules do at first use only; as trusted.
        packages: folders besides the standard library from which programs may import.
        with_namespaces: None takes them where the kernel allows them.
    """

    def __init__(
        self,
        preload: Sequence[str] = (),
        packages: Sequence[str] = (),
        warm: str = "",
        with_namespaces: bool | None = None,
    ) -> None:
        self._preload = [*_PRELOADED, *preload]
        self._packages = [str(path) for path in packages]
        self._warm = warm
        self._wanted = with_namespaces
        self._lock = threading.Lock()
        self._owner = os.getpid()
        self._orders: socket.socket | None = None
        self._nursery: subprocess.Popen[bytes] | None = None
        self._why_not = ""
        self.has_namespaces = False
        self.landlock = 0

    def run(
        self,
        source: str,
        *,
        stdin: str = "",
        limits: Limits | None = None,
        require: Collection[Protection] | None = None,
    ) -> Outcome:
        """Run a program to its end.

        Args:
            require: protections without which it is not run; None: all but those in LONGREACH_SANDBOX_WITHOUT.

        Raises:
            SandboxError: a required protection is not to be had here, or no program can be run.
        """
        self._check(require)
        limits = limits or Limits()
        if limits.processes > 1 and not self.has_namespaces:
            raise SandboxError(
                f"processes={limits.processes}: this machine gives programs no process namespace, and without one their "
                f"number cannot be bounded; use processes=1 or allow user namespaces"
            )
        for attempt in (1, 2):
            orders = self._started()
            outcome = self._run(orders, source, stdin, limits)
            if outcome is not None:
                return outcome
            self._lost(orders)
            # The machine may have run out of memory; a second time is no accident.
            if attempt == 2:
                break
        raise SandboxError("the process that starts programs ended twice; is the machine out of memory or processes?")

    def protections(self) -> dict[Protection, str]:
        """What guards each, in words; "" where nothing does.

        Raises:
            SandboxError: no program can be run here.
        """
        self._started()
        calls = "filter of system calls"
        landlock = f"Landlock {self.landlock}" if self.landlock else ""
        if self.has_namespaces:
            return {
                "network": f"network namespace, {calls}",
                "files": ", ".join(filter(None, ["mount namespace", landlock])),
                "processes": f"process and user namespace, {calls}",
            }
        return {"network": calls, "files": landlock, "processes": f"none can be started or signalled: {calls}"}

    def close(self) -> None:
        """Let the nursery end; programs under way run to their own."""
        with self._lock:
            if self._orders is not None:
                self._orders.close()
            nursery, self._orders, self._nursery = self._nursery, None, None
        if nursery is not None and self._owner == os.getpid():
            try:
                nursery.wait(5)
            except subprocess.TimeoutExpired:
                nursery.kill()
                nursery.wait()

    def _check(self, require: Collection[Protection] | None) -> None:
        if require is None:
            without = [name for name in os.environ.get(WITHOUT, "").replace(" ", "").split(",") if name]
            for name in without:
                if name not in PROTECTIONS:
                    raise SandboxError(f"{WITHOUT} names {name!r}; protections are {', '.join(PROTECTIONS)}")
            require = [name for name in PROTECTIONS if name not in without]
        held = self.protections()
        for name in require:
            if not held[name]:
                raise SandboxError(
                    f"this machine does not protect {name} from programs that are judged by running them: it has neither "
                    f"Landlock nor user namespaces for us ({self._why_not or 'no reason given'}). Use Linux 5.13 or "
                    f"newer, or set {WITHOUT}={name} if nothing on it needs protection"
                )

    def _started(self) -> socket.socket:
        with self._lock:
            if self._owner != os.getpid():
                # After a fork: the nursery is another process's child and its socket is shared.
                if self._orders is not None:
                    self._orders.close()
                self._orders, self._nursery, self._owner = None, None, os.getpid()
            if self._orders is None:
                self._start()
            assert self._orders is not None
            return self._orders

    def _start(self) -> None:
        if not sys.platform.startswith("linux"):
            raise SandboxError(
                f"programs are run on Linux only, this is {sys.platform}; use a Linux machine or container"
            )
        why = []
        for with_namespaces in [True, False] if self._wanted is None else [self._wanted]:
            try:
                self._start_with(with_namespaces)
                return
            except SandboxError as error:
                why.append(str(error))
                self._why_not = str(error)
        raise SandboxError("no program can be run safely on this machine: " + "; ".join(why))

    def _start_with(self, with_namespaces: bool) -> None:
        """Start a nursery and see it run a first program.

        Raises:
            SandboxError: it could not.
        """
        here = str(Path(__file__).resolve().parents[2])
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with tempfile.TemporaryDirectory(prefix="longreach-") as base, theirs:
            settings = {
                "with_namespaces": with_namespaces,
                "preload": self._preload,
                "packages": self._packages,
                "warm": self._warm,
                "hidden": [here],
                "base": base,
                "scratches": tempfile.gettempdir(),
            }
            begin = f"import sys; sys.path.insert(0, {here!r}); from longreach.tasks.sandbox_child import main; main()"
            python = getattr(sys, "_base_executable", None) or sys.executable
            # The same hashes in every program: a verdict does not depend on the order of a set.
            nursery = subprocess.Popen(
                [python, "-P", "-s", "-S", "-B", "-X", "utf8", "-c", begin, str(theirs.fileno()), json.dumps(settings)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                pass_fds=[theirs.fileno()],
                env={"PYTHONHASHSEED": "0"},
                cwd="/",
                start_new_session=True,
            )
            theirs.close()
            ours.settimeout(60)
            try:
                said = json.loads(ours.recv(4096) or b'{"error": "it ended at once"}')
            except (TimeoutError, OSError) as error:
                said = {"error": str(error)}
        assert nursery.stderr is not None
        if "error" in said:
            ours.close()
            nursery.kill()
            more = nursery.stderr.read().decode(errors="replace").strip().splitlines()
            nursery.wait()
            raise SandboxError(" ".join([said["error"], *more[-1:]]))
        nursery.stderr.close()
        self._orders, self._nursery, self.has_namespaces = ours, nursery, with_namespaces
        try:
            # Imports what is not loaded yet: the standard library has to be in reach.
            first = self._run(ours, "import _decimal, wave, sys; print('ready')", "", Limits(wall_s=30.0))
        except SandboxError:
            self._forget()
            raise
        if first is None or first.stdout != "ready\n":
            self._forget()
            raise SandboxError(f"a first program failed: {first.last_error or first.reason if first else 'no report'}")
        from longreach.tasks import confine

        self.landlock = confine.landlock_version()

    def _forget(self) -> None:
        """End a nursery that is of no use. The lock is held."""
        assert self._orders is not None and self._nursery is not None
        self._orders.close()
        self._nursery.kill()
        self._nursery.wait()
        self._orders, self._nursery = None, None

    def _lost(self, orders: socket.socket) -> None:
        with self._lock:
            if self._orders is orders:
                self._forget()

    def _run(self, orders: socket.socket, source: str, stdin: str, limits: Limits) -> Outcome | None:
        """None: the nursery is gone."""
        control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        out, out_end = os.pipe()
        err, err_end = os.pipe()
        given = [_file_of(source), _file_of(stdin), out_end, err_end, theirs.fileno()]
        with control:
            try:
                try:
                    socket.send_fds(orders, [json.dumps(asdict(limits)).encode()], given)
                except OSError:
                    return None
                finally:
                    theirs.close()
                    for file in given[:4]:
                        os.close(file)
                told, texts, is_flood = _listen(control, out, err, limits)
            finally:
                os.close(out)
                os.close(err)
        if told is None:
            return None
        if told["error"]:
            raise SandboxError(f"a program could not be confined: {told['error']}")
        status = told["status"]
        code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else None
        stdout, stderr = (text.decode("utf-8", "replace") for text in texts)
        outcome = Outcome(stdout, stderr, code, "ok", told["seconds"], told["cpu_s"])
        reason = _reason(outcome, status, told["stopped"], is_flood, limits)
        return Outcome(stdout, stderr, code, reason, told["seconds"], told["cpu_s"])


def _file_of(text: str) -> int:
    """A file in memory with this text, to be read from its beginning, which nobody can change any more."""
    import fcntl

    file = os.memfd_create("text", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    data = text.encode("utf-8", "surrogatepass")
    while data:
        data = data[os.write(file, data) :]
    os.lseek(file, 0, os.SEEK_SET)
    seals = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
    fcntl.fcntl(file, fcntl.F_ADD_SEALS, seals)
    return file


def _listen(control: socket.socket, out: int, err: int, limits: Limits) -> tuple[dict | None, list[bytes], bool]:
    """Read both pipes until the guardian reports; stop the program where it writes too much.

    Returns:
        The report (None: the guardian is gone), both texts, whether there was too much.
    """
    most = limits.output_kib << 10
    texts = {out: b"", err: b""}
    is_flood = False
    poll = select.poll()
    for file in (control.fileno(), out, err):
        poll.register(file, select.POLLIN)
    for file in (out, err):
        os.set_blocking(file, False)

    def read(file: int) -> bool:
        """Whether there may be more."""
        try:
            piece = os.read(file, min(65536, most + 1 - len(texts[file])))
        except BlockingIOError:
            return False
        texts[file] += piece
        return bool(piece) and len(texts[file]) <= most

    give_up = time.monotonic() + limits.wall_s + _GRACE_S
    while True:
        ready = [file for file, _ in poll.poll(max(0.0, give_up - time.monotonic()) * 1000)]
        if not ready:
            raise SandboxError(
                f"a program was not ended {_GRACE_S:.0f} s after its time; the machine is not keeping up"
            )
        if control.fileno() in ready:
            message = control.recv(65536)
            for file in texts:
                while len(texts[file]) <= most and read(file):
                    pass
            is_flood = is_flood or any(len(text) > most for text in texts.values())
            return (json.loads(message) if message else None), [text[:most] for text in texts.values()], is_flood
        for file in ready:
            if not read(file):
                poll.unregister(file)
                if len(texts[file]) > most and not is_flood:
                    is_flood = True
                    control.shutdown(socket.SHUT_WR)


def _reason(outcome: Outcome, status: int, stopped: str | None, is_flood: bool, limits: Limits) -> Reason:
    if stopped == "wall" or stopped == "files":
        return stopped
    if is_flood:
        return "output"
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number == signal.SIGXCPU or (number == signal.SIGKILL and outcome.cpu_s >= limits.cpu_s):
            return "cpu"
        return "signal"
    if outcome.exit_code == 0:
        return "ok"
    return "memory" if outcome.last_error.startswith("MemoryError") else "exit"


_sandboxes: dict[tuple[tuple[str, ...], tuple[str, ...], str], Sandbox] = {}
_sandboxes_lock = threading.Lock()


def sandbox(preload: Sequence[str] = (), packages: Sequence[str] = (), warm: str = "") -> Sandbox:
    """This process's sandbox with these modules; its nursery starts with the first program and ends with the process."""
    key = (tuple(preload), tuple(packages), warm)
    with _sandboxes_lock:
        if key not in _sandboxes:
            _sandboxes[key] = Sandbox(preload, packages, warm)
            atexit.register(_sandboxes[key].close)
        return _sandboxes[key]


def run_python(
    source: str, *, stdin: str = "", limits: Limits | None = None, require: Collection[Protection] | None = None
) -> Outcome:
    """Run a program to its end; see `Sandbox.run`."""
    return sandbox().run(source, stdin=stdin, limits=limits, require=require)


def run_many(programs: Iterable[Program], workers: int | None = None) -> list[Outcome]:
    """Run programs beside each other, `workers` at a time (None: one for each core), and give their outcomes in order."""
    workers = workers or len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(lambda p: run_python(p.source, stdin=p.stdin, limits=p.limits), programs))


class Protections(NamedTuple):
    """What `protections` found. An empty text: nothing guards it."""

    network: str
    files: str
    processes: str


def protections() -> Protections:
    """What guards network, files and processes from programs on this machine, in words.

    Raises:
        SandboxError: no program can be run here.
    """
    return Protections(**sandbox().protections())
