"""What the Linux kernel offers to a program that gives up rights: namespaces, Landlock, a filter of system calls, limits.

    new_root(paths)             a file system that holds these paths, read-only, and nothing else
    restrict_files(…)           Landlock: files outside of these folders cannot be opened
    filter_calls(…)             seccomp: system calls that are refused from now on
    limit_resources(…)          CPU time, memory, size of files, processes

None of it can be undone, none needs rights to begin with (`new_root` needs user namespaces or root). Each raises OSError
where the kernel has it not. Used by `longreach.tasks.sandbox_child` only, which runs without site-packages: this module needs
the standard library alone.
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import stat
import struct
import sys
from collections.abc import Iterable, Sequence

NEW_MOUNTS = 0x00020000
NEW_CGROUP = 0x02000000
NEW_NAMES = 0x04000000
NEW_IPC = 0x08000000
NEW_USERS = 0x10000000
NEW_PIDS = 0x20000000
NEW_NETWORK = 0x40000000
NEW_TIME = 0x00000080

NOBODY = 65534

_libc = ctypes.CDLL(None, use_errno=True)


def _checked(result: int, what: str) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result


def _call(number: int, what: str, *arguments: object) -> int:
    """A system call by its number."""
    passed = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    return _checked(_libc.syscall(ctypes.c_long(number), *passed), what)


def _control(what: str, option: int, *arguments: object) -> int:
    """`prctl`; all five arguments, for the kernel checks those that are not used."""
    passed = [ctypes.c_ulong(a) if isinstance(a, int) else a for a in arguments]
    passed += [ctypes.c_ulong(0)] * (4 - len(passed))
    return _checked(_libc.prctl(option, *passed), what)


# Processes.


def die_with_parent() -> None:
    """Be killed when the process that forked this one ends. Lost at a change of user, so to be repeated after one."""
    _control("PR_SET_PDEATHSIG", 1, 9)


def set_dumpable(is_dumpable: bool) -> None:
    """Whether processes of the same user may look into this one."""
    _control("PR_SET_DUMPABLE", 4, int(is_dumpable))


def drop_privileges() -> None:
    """No capability, none to be had, and no set-uid program gives any."""
    _control("PR_SET_NO_NEW_PRIVS", 38, 1)
    for capability in range(64):
        try:
            _control("PR_CAPBSET_DROP", 24, capability)
        except OSError as error:
            if error.errno == errno.EINVAL:  # beyond the last there is
                break
            if error.errno != errno.EPERM:  # without rights there are none to drop
                raise
    header = struct.pack("Ii", 0x20080522, 0)  # version 3, this process
    _checked(_libc.capset(header, struct.pack("6I", *[0] * 6)), "capset")


def limit_resources(cpu_s: int, memory_mib: int, file_mib: int, processes: int | None) -> None:
    """Bound this process and each of its children; the limits can be lowered, never raised.

    Args:
        cpu_s: at the limit SIGXCPU arrives, a second later the process is killed.
        memory_mib: of address space, so of all that is mapped.
        processes: of this user in this user namespace, threads counted; None: not bounded here.
    """
    bounds = {
        resource.RLIMIT_CPU: (cpu_s, cpu_s + 1),
        resource.RLIMIT_AS: (memory_mib << 20,) * 2,
        resource.RLIMIT_FSIZE: (file_mib << 20,) * 2,
        resource.RLIMIT_NOFILE: (64, 64),
        resource.RLIMIT_CORE: (0, 0),
        resource.RLIMIT_MEMLOCK: (0, 0),
        resource.RLIMIT_MSGQUEUE: (0, 0),
    }
    if processes is not None:
        bounds[resource.RLIMIT_NPROC] = (processes,) * 2
    for name, (soft, hard) in bounds.items():
        allowed = resource.getrlimit(name)[1]
        if allowed != resource.RLIM_INFINITY:
            soft, hard = min(soft, allowed), min(hard, allowed)
        resource.setrlimit(name, (soft, hard))


# Namespaces.


def unshare(kinds: int) -> None:
    _checked(_libc.unshare(kinds), "unshare")


def map_user(proc: int, uid: int, gid: int, inside: int) -> None:
    """In a new user namespace: be user `inside`, who outside is (uid, gid). `proc`: /proc, opened."""
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{inside} {uid} 1"),
        ("gid_map", f"{inside} {gid} 1"),
    ):
        file = os.open(f"self/{name}", os.O_WRONLY, dir_fd=proc)
        try:
            os.write(file, text.encode())
        finally:
            os.close(file)


_DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
_RDONLY, _NOSUID, _NODEV, _NOEXEC = 1, 2, 4, 8
_BIND, _REC, _PRIVATE = 4096, 16384, 1 << 18


def mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    encoded = [os.fsencode(text) for text in (source, target, kind)]
    _checked(_libc.mount(*encoded, ctypes.c_ulong(flags), options.encode()), f"mount {target}")


def mount_scratch(target: str, size_mib: int, num_files: int) -> None:
    """A folder in memory that holds so much and no more, from which nothing can be executed."""
    options = f"size={size_mib}m,nr_inodes={num_files},mode=1777"
    mount("scratch", target, "tmpfs", _NOSUID | _NODEV | _NOEXEC, options)


def _make_read_only(target: str, everything_below: bool) -> None:
    attributes = struct.pack("4Q", _RDONLY | _NOSUID, 0, 0, 0)
    flags = 0x8000 if everything_below else 0  # AT_RECURSIVE
    _call(442, "mount_setattr", -100, os.fsencode(target), flags, attributes, len(attributes))


def new_root(paths: Iterable[str], base: str) -> None:
    """Leave the file system for one that has these folders and files, read-only, devices that do no harm, and an empty /tmp.

    Needs a mount namespace of its own. What was open stays open.

    Args:
        base: an existing folder on which the new root is built; unseen by all other processes.
    """
    mount("none", "/", "none", _REC | _PRIVATE)
    mount("root", base, "tmpfs", _NOSUID | _NODEV, "size=1m,mode=755")
    for path in (*paths, *_DEVICES):
        if not os.path.exists(path):
            continue
        place = base + path
        if os.path.lexists(place):
            continue
        os.makedirs(os.path.dirname(place), exist_ok=True)
        if os.path.islink(path):  # /lib -> usr/lib
            os.symlink(os.readlink(path), place)
            continue
        if os.path.isdir(path):
            os.mkdir(place)
        else:
            os.close(os.open(place, os.O_CREAT | os.O_WRONLY, 0o644))
        mount(path, place, "none", _BIND | _REC)
        if path not in _DEVICES:
            _make_read_only(place, everything_below=True)
    os.makedirs(base + "/tmp", exist_ok=True)
    os.chdir(base)
    _call(_NUMBERS["pivot_root"], "pivot_root", b".", b".")
    _checked(_libc.umount2(b".", 2), "umount2")  # MNT_DETACH: the old root, which lies over the new one
    os.chdir("/")
    _make_read_only("/", everything_below=False)


# Landlock.

_EXECUTE, _WRITE, _READ, _LIST = 1, 2, 4, 8
_REMOVE, _MAKE_DEVICE, _MAKE_DIR, _MAKE_FILE = 3 << 4, 1 << 6 | 1 << 11, 1 << 7, 1 << 8
_MAKE_SOCKET, _MAKE_PIPE, _MAKE_LINK = 1 << 9, 1 << 10, 1 << 12
_MOVE, _TRUNCATE, _DEVICE_CONTROL = 1 << 13, 1 << 14, 1 << 15
_OF_A_FILE = _EXECUTE | _WRITE | _READ | _TRUNCATE


def landlock_version() -> int:
    """Of the kernel's Landlock; 0 where it has none or does not use it."""
    try:
        return _call(444, "landlock_create_ruleset", None, 0, 1)
    except OSError:
        return 0


def restrict_files(read_only: Iterable[str], scratch: str, with_folders: bool) -> None:
    """Let files be opened below these paths and nowhere else; no TCP, no signals to processes outside (newer kernels).

    Landlock does not ask about `stat`, `chmod` and their like: see `filter_calls`.

    Args:
        scratch: may be written to.
        with_folders: whether folders may be made there.
    """
    version = landlock_version()
    files = (1 << (13, 13, 14, 15, 15, 16)[min(version, 5)]) - 1
    scratch_rights = _WRITE | _READ | _LIST | _REMOVE | _MAKE_FILE | _MAKE_LINK | _MAKE_PIPE | _TRUNCATE
    scratch_rights |= (_MAKE_DIR | _MOVE) if with_folders else 0
    attributes = struct.pack("3Q", files, 3, 3)[: 8 if version < 4 else 16 if version < 6 else 24]
    rules = _call(444, "landlock_create_ruleset", attributes, len(attributes), 0)
    rights_of = {path: _EXECUTE | _READ | _LIST for path in read_only if os.path.exists(path)}
    rights_of |= dict.fromkeys(_DEVICES, _READ | _WRITE)
    rights_of[scratch] = scratch_rights
    for path, rights in rights_of.items():
        beneath = os.open(path, os.O_PATH | os.O_CLOEXEC)
        if not stat.S_ISDIR(os.fstat(beneath).st_mode):
            rights &= _OF_A_FILE
        _call(445, "landlock_add_rule", rules, 1, struct.pack("=Qi", rights & files, beneath), 0)
        os.close(beneath)
    _call(446, "landlock_restrict_self", rules, 0)
    os.close(rules)


# The filter of system calls.

# name: number on x86-64, on aarch64; None where the machine has it not.
CALLS: dict[str, tuple[int | None, int | None]] = {
    # other computers, other processes' sockets
    "socket": (41, 198), "connect": (42, 203), "accept": (43, 202), "accept4": (288, 242), "bind": (49, 200),
    "listen": (50, 201), "socketpair": (53, 199),
    # other processes
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272),
    "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240), "migrate_pages": (256, 238), "move_pages": (279, 239), "prlimit64": (302, 261),
    # new processes
    "clone": (56, 220), "fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281),
    # namespaces, mounts, roots
    "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41),
    "chroot": (161, 51), "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265), "mknod": (133, None),
    "mknodat": (259, 33), "quotactl": (179, 60), "fanotify_init": (300, 262), "fanotify_mark": (301, 263),
    # memory that no limit counts, and what outlives a process
    "memfd_create": (319, 279), "shmget": (29, 194), "shmat": (30, 196), "shmctl": (31, 195), "shmdt": (67, 197),
    "semget": (64, 190), "semop": (65, 193), "semctl": (66, 191), "semtimedop": (220, 192), "msgget": (68, 186),
    "msgsnd": (69, 189), "msgrcv": (70, 188), "msgctl": (71, 187), "mq_open": (240, 180), "mq_unlink": (241, 181),
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
    # large and rarely needed parts of the kernel
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "io_setup": (206, 0),
    "io_destroy": (207, 1), "io_submit": (209, 2), "io_cancel": (210, 3), "vmsplice": (278, 75), "seccomp": (317, 277),
    "modify_ldt": (154, None), "personality": (135, 92), "uselib": (134, None), "mbind": (237, 235),
    "set_mempolicy": (238, 237), "lookup_dcookie": (212, 18),
    # the machine itself
    "reboot": (169, 142), "kexec_load": (246, 104), "kexec_file_load": (320, 294), "init_module": (175, 105),
    "finit_module": (313, 273), "delete_module": (176, 106), "swapon": (167, 224), "swapoff": (168, 225),
    "acct": (163, 89), "settimeofday": (164, 170), "clock_settime": (227, 112), "clock_adjtime": (305, 266),
    "adjtimex": (159, 171), "sethostname": (170, 161), "setdomainname": (171, 162), "syslog": (103, 116),
    "vhangup": (153, 58), "iopl": (172, None), "ioperm": (173, None),
    # properties of files, which Landlock does not guard
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "chown": (92, None), "fchown": (93, 55),
    "lchown": (94, None), "fchownat": (260, 54), "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7),
    "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16), "utime": (132, None),
    "utimes": (235, None), "futimesat": (261, None), "utimensat": (280, 88),
}  # fmt: skip

_PROPERTIES = ("chmod", "fchmod", "fchmodat", "chown", "fchown", "lchown", "fchownat", "setxattr", "lsetxattr",
               "fsetxattr", "removexattr", "lremovexattr", "fremovexattr", "utime", "utimes", "futimesat",
               "utimensat")  # fmt: skip
_SIGNALS = ("kill", "tkill", "tgkill", "rt_sigqueueinfo", "rt_tgsigqueueinfo")
_STARTS = ("fork", "vfork", "execve", "execveat")
_CONDITIONAL = {"clone", "socketpair", "prlimit64", *_PROPERTIES, *_SIGNALS, *_STARTS}

# From 424 on all machines count alike. Of these, close_range, openat2, faccessat2 and epoll_pwait2 are let through and all
# others are refused as unknown, io_uring and those not invented yet among them; C libraries then take the older way.
FIRST_COMMON = 424
COMMON_ALLOWED = (436, 437, 439, 441)

_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
_COLUMN, _ARCHITECTURE = _MACHINES.get(os.uname().machine, (-1, 0))
_NUMBERS = {name: number for name, both in CALLS.items() if (number := both[_COLUMN]) is not None}

_ALLOW = 0x7FFF0000
_KILL = 0x80000000
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _AND, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x54, 0x06


def _refuse(code: int) -> int:
    return 0x00050000 | code


def _filter(may_start: bool, only_signal: int | None, with_properties: bool) -> bytes:
    """The filter as classic BPF: A is the number of the call, then one rule after the other."""
    code: list[tuple[int, int, int, int]] = []

    def argument(index: int) -> tuple[int, int, int, int]:
        return (_LOAD, 0, 0, 16 + 8 * index)  # its lower half

    def rule(name: str, *then: tuple[int, int, int, int]) -> None:
        if name in _NUMBERS:
            code.append((_EQUAL, 0, len(then), _NUMBERS[name]))
            code.extend(then)

    allow, refuse = (_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _refuse(errno.EPERM))
    busy, unknown = (_RETURN, 0, 0, _refuse(errno.EAGAIN)), (_RETURN, 0, 0, _refuse(errno.ENOSYS))
    code += [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, _ARCHITECTURE), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, 0)]
    for number in COMMON_ALLOWED:
        code += [(_EQUAL, 0, 1, number), allow]
    code += [(_AT_LEAST, 0, 1, FIRST_COMMON), unknown]
    for name in _NUMBERS:
        if name not in _CONDITIONAL:
            rule(name, refuse)
    # A pair of connected stream sockets is a pipe; datagram sockets could still send to any address.
    rule("socketpair", argument(1), (_AND, 0, 0, 0xF), (_EQUAL, 0, 1, 1), allow, refuse)
    # The limits of this process may be read and lowered, those of others not.
    rule("prlimit64", argument(0), (_EQUAL, 0, 1, 0), allow, refuse)
    if may_start:
        spaces = NEW_MOUNTS | NEW_CGROUP | NEW_NAMES | NEW_IPC | NEW_USERS | NEW_PIDS | NEW_NETWORK | NEW_TIME
        # The lowest byte of the flags is the signal at exit, so NEW_TIME cannot be asked for here.
        rule("clone", argument(0), (_ANY_BIT, 0, 1, spaces & ~0xFF), refuse, allow)
    else:
        for name in ("clone", "fork", "vfork"):
            rule(name, busy)
        for name in ("execve", "execveat"):
            rule(name, refuse)
    if only_signal is not None:
        for name in _SIGNALS:
            rule(name, argument(0), (_EQUAL, 0, 1, only_signal), allow, refuse)
    if not with_properties:
        for name in _PROPERTIES:
            rule(name, refuse)
    code.append(allow)
    return b"".join(struct.pack("=HBBI", *line) for line in code)


def filter_calls(may_start: bool, only_signal: int | None, with_properties: bool) -> None:
    """Refuse the system calls of `CALLS`, of this process and all it starts.

    Args:
        may_start: whether processes, threads and other programs may be started.
        only_signal: the one process that may be signalled; None: any that can be seen.
        with_properties: whether the mode, owner, times and attributes of files may be set.

    Raises:
        OSError: this machine's numbers are not known, or the kernel has no such filter.
    """
    if _COLUMN < 0:
        raise OSError(errno.ENOSYS, f"system calls of {os.uname().machine} are not known here")
    code = _filter(may_start, only_signal, with_properties)
    buffer = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(buffer))
    _control("PR_SET_SECCOMP", 22, 2, program)


def system_paths(more: Sequence[str] = ()) -> list[str]:
    """Where shared libraries and this interpreter's standard library lie, and `more`; outer folders first."""
    prefixes = (sys.base_prefix, sys.exec_prefix)
    found = ["/usr", "/lib", "/lib32", "/lib64", "/bin", "/nix/store", "/etc/ld.so.cache", *prefixes, *more]
    found += [os.path.realpath(path) for path in prefixes]
    chosen: list[str] = []
    for path in sorted(set(found), key=len):
        inside = any(path.startswith(outer.rstrip("/") + "/") for outer in chosen if not os.path.islink(outer))
        if os.path.exists(path) and not inside and path != "/":
            chosen.append(path)
    return chosen
