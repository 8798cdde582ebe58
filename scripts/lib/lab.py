"""Runs a command on the lab: a bare-metal host emulated by QEMU, with a real KVM (SVM) inside, made anew for each run; or two.
It is no test runner and knows nothing of Toft: what to run and which files to bring is its caller's.
Started by scripts/lab."""

import argparse
import concurrent.futures
import contextlib
import ctypes
import fcntl
import json
import os
import re
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import debian
import lab_image

# The lab's own failures, so that they are not taken for the command's.
STATUS_LAB_FAILED = 125
STATUS_TIMEOUT = 124
# Between functions here only; no command can end with it.
STATUS_STOPPED = -1
# Beyond the command's own time: boot, unpacking, packing. Slow machines need most of it.
GRACE_S = 180
# What keeps guests alive on an emulated EPYC. It shows no constant TSC, so Linux would distrust the clock, and KVM then
# moves the clock of its guests at each exit. And QEMU's nested paging (7.2 and 10.0) sometimes finds no page where a guest
# runs: about one guest in seven died of a triple fault or stood still. Without it starting a guest takes a tenth longer, and a
# process started in a guest three times as long (QEMU 10.0 then loses guests at once: it takes each read of a control register for one of
# CR0, which KVM lets pass, so that they see the table of pages they really run on); `pkill -x python3; modprobe -r kvm_amd && modprobe kvm_amd npt=1` gives it back, and
# ends the VMs that are kept (lab/files/usr/sbin/lab-init).
STABLE = "tsc=reliable kvm_amd.npt=0"
# QEMU 7.2 finds what it has translated by its address: with random ones it translates each program's libraries anew whenever one is
# started, which then takes 18 ms in place of 3. What keeps a processor from guessing costs time here, too, a tenth of a guest's start,
# and an emulated one guesses nothing. scripts/lib/linux-test gives guests the same.
QUICK = "norandmaps mitigations=off"
# Each of the host's processors beats once a second. In some hundred runs on a busy machine the host was never silent for more than 3 s.
SILENCE_S = 20
PROCESSORS = b"01"
# The results' disk is sparse; this bounds what a runaway command can hand back.
RESULTS_BYTES = 16 << 30
PR_SET_PDEATHSIG = 1


def arguments():
    parser = argparse.ArgumentParser(
        prog="scripts/lab", formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="scripts/lab [OPTIONS] [--] COMMAND [ARGUMENT...]\n       scripts/lab [OPTIONS] shell",
        description="Runs a command as root on an emulated bare-metal host with a working /dev/kvm, and removes the host afterwards.",
        epilog="A COMMAND without arguments may be a line of shell: scripts/lab 'uname -a; ls -l /dev/kvm'\n"
               "Output arrives as it is written, on the same stream, and the command's exit status is returned;\n"
               "124 means that the time was up, 125 that the lab itself failed. One such failure is that the emulated host\n"
               f"stopped: one of its processors gave no sign of life for {SILENCE_S} s. The lab says so and ends at once, or starts over with --again.\n"
               "The command reads no standard input, and the host has no network beyond its loopback.\n"
               "With --hosts 2 it is run on two alike, with LAB_HOST in its environment: 0 on the first, 1 on the second. The lab ends\n"
               "with the first one's command, whose status and files it takes. Two wires join them and lead nowhere else: eth0, where\n"
               "they are 192.0.2.1 and 192.0.2.2, and eth1, which is left to the command.\n"
               "`shell` opens a shell on the host's console; nobody watches whether that host lives.")
    parser.add_argument("--hosts", type=int, default=1, choices=(1, 2), help="how many hosts (1)")
    parser.add_argument("--memory-mib", type=int, default=3072, metavar="N", help="memory of the host (3072)")
    parser.add_argument("--disk-mib", type=int, default=0, metavar="N", help="add an empty ext4 disk of this size, mounted on /space")
    parser.add_argument("--timeout", type=int, default=1200, metavar="S", help="end the command after so many seconds (1200)")
    parser.add_argument("--again", type=int, default=0, metavar="N", help="start over on a new host, up to N times, when the emulated host stops (0)")
    parser.add_argument("--restarts", action="store_true", help="let the host restart itself, by `echo b > /proc/sysrq-trigger` say, which\n"
                        "loses what is in its memory; the command is then started again, with LAB_BOOT in its environment\n"
                        "counting from 0, and disks are as they were")
    parser.add_argument("--put", action="append", default=[], metavar="SRC:DEST", help="copy a file or directory to this path of the host first")
    parser.add_argument("--get", action="append", default=[], metavar="PATH:DEST", help="copy a file or directory of the host here at the end, also after a failure or a timeout")
    parser.add_argument("--verbose", action="store_true", help="show the host's kernel console on stderr")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="COMMAND")
    wanted = parser.parse_args()
    if wanted.command[:1] == ["--"]:
        del wanted.command[0]
    if not wanted.command:
        parser.error("say which command to run, or `shell`")
    if wanted.hosts > 1 and (wanted.restarts or wanted.command == ["shell"]):
        parser.error("--hosts 2 goes with neither --restarts nor `shell`")
    if wanted.memory_mib < 512 or wanted.timeout < 1 or wanted.disk_mib < 0 or wanted.again < 0:
        parser.error("--memory-mib needs 512 or more, --timeout 1 or more, --disk-mib and --again 0 or more")
    for name in ("put", "get"):
        pairs = [tuple(pair.rsplit(":", 1)) for pair in getattr(wanted, name)]
        setattr(wanted, name, pairs)
        for pair in pairs:
            guest = pair[-1] if name == "put" else pair[0]
            if len(pair) != 2 or not pair[1] or not guest.startswith("/") or guest.strip("/") == "":
                parser.error(f"--{name} takes {'SRC:/DEST' if name == 'put' else '/PATH:DEST'}, with an absolute path on the host")
    return wanted


@contextlib.contextmanager
def workplace():
    """A directory for one run. Those of runs that were killed are removed by the next one."""
    runs = debian.cache_directory() / "lab-runs"
    runs.mkdir(exist_ok=True)
    with debian.locked(runs / ".lock"):
        for path in runs.iterdir():
            if path.is_dir():
                with contextlib.suppress(OSError), open(path / "alive", "a") as held:
                    fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(path, ignore_errors=True)
        path = Path(tempfile.mkdtemp(dir=runs))
        alive = open(path / "alive", "a")
        fcntl.flock(alive, fcntl.LOCK_EX)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        alive.close()


def pack(wanted, directory):
    """The files to bring and what to do with them, as a tar that the host reads straight from a disk."""
    settings = directory / "run-lab"
    settings.mkdir()
    shell = wanted.command == ["shell"]
    size = shutil.get_terminal_size()
    (settings / "settings").write_text(f"mode={'shell' if shell else 'command'}\ntimeout_s={wanted.timeout}\n"
                                       f"rows={size.lines}\ncolumns={size.columns}\n")
    # One word may be a whole line of shell, as with ssh.
    words = wanted.command if len(wanted.command) > 1 else ["bash", "-c", wanted.command[0]]
    (settings / "command").write_bytes(b"".join(os.fsencode(word) + b"\0" for word in words))
    (settings / "get").write_bytes(b"".join(os.fsencode(path.strip("/")) + b"\0" for path, _ in wanted.get))
    tar = directory / "put.tar"
    subprocess.run(["tar", "-C", directory, "-cf", tar, "run-lab"], check=True)
    for source, destination in wanted.put:
        source = Path(source).resolve(strict=True)
        # Only names of members and of hard links are renamed (r, h), never what a symbolic link points at (S).
        rename = f"s,^{_pattern(source.name)}\\(/\\|$\\),{_replacement(destination.strip('/'))}\\1,rhS"
        subprocess.run(["tar", "--sparse", "--owner=0", "--group=0", "--numeric-owner", "-C", source.parent, f"--transform={rename}",
                        "-rf", tar, "--", source.name], check=True)
    return tar


def unpack(wanted, disk):
    """Puts each result where the caller wants it."""
    for path, destination in wanted.get:
        name, target = path.strip("/"), Path(destination).absolute()
        target.parent.mkdir(parents=True, exist_ok=True)
        rename = f"s,^{_pattern(name)}\\(/\\|$\\),{_replacement(target.name)}\\1,rhS"
        subprocess.run(["tar", "--sparse", "--no-same-owner", "-C", target.parent, f"--transform={rename}", "-xf", disk, "--", name],
                       check=True)


def _pattern(text):
    return re.sub(r"([][\\.*^$,])", r"\\\1", text)


def _replacement(text):
    return re.sub(r"([\\&,])", r"\\\1", text)


class Host:
    """One emulated host: a QEMU process and the streams that come out of it."""

    def __init__(self, wanted, image, files, directory, number, wires):
        """`files` is what `pack` made, `wires` are the ends of the host's own sockets to the others."""
        directory.mkdir()
        self.console = directory / "console.log"
        self.errors = directory / "qemu.log"
        self.results = directory / "results.raw"
        self.shell = wanted.command == ["shell"]
        self.restarts = wanted.restarts
        self.stopped = None
        # Whoever counts what is said counts what the first host says.
        self.mark = b"the other host: " if number else b""
        disks = [f"file={image / 'root.raw'},snapshot=on", f"file={files},serial=put,readonly=on"]
        if wanted.get and number == 0:
            _sparse(self.results, RESULTS_BYTES)
            disks.append(f"file={self.results},serial=get")
        if wanted.disk_mib:
            space = directory / "space.raw"
            _sparse(space, wanted.disk_mib << 20)
            subprocess.run(["mke2fs", "-q", "-t", "ext4", "-F", "-m", "0", space], check=True)
            disks.append(f"file={space},serial=space")
        serial = ["-chardev", "stdio,id=console,signal=off"] if self.shell else ["-chardev", f"file,id=console,path={self.console}"]
        command = [
            "qemu-system-x86_64", "-machine", "q35", "-accel", "tcg,thread=multi", "-cpu", "EPYC", "-smp", str(len(PROCESSORS)),
            "-m", str(wanted.memory_mib), "-nodefaults", "-no-user-config", "-display", "none", "-nic", "none",
            *([] if wanted.restarts else ["-no-reboot"]),
            "-kernel", image / "vmlinuz", "-initrd", image / "initrd",
            "-append", f"console=ttyS0 panic=-1 loglevel=4 net.ifnames=0 {STABLE} {QUICK} LAB_HOST={number}",
            *serial, "-serial", "chardev:console", "-device", "virtio-rng-pci", "-device", "virtio-serial-pci",
        ]
        for disk in disks:
            file, *options = disk.split(",")
            serial_option = "".join(f",{o}" for o in options if o.startswith("serial="))
            drive_options = "".join(f",{o}" for o in options if not o.startswith("serial="))
            drive = f"disk{len(command)}"
            command += ["-drive", f"{file},format=raw,if=none,id={drive},cache=unsafe,discard=unmap{drive_options}",
                        "-device", f"virtio-blk-pci,drive={drive}{serial_option}"]
        ours, theirs = socket.socketpair()
        self.monitor, ends = ours, [theirs, *wires]
        for at, wire in enumerate(wires):
            command += ["-netdev", f"socket,id=wire{at},fd={wire.fileno()}",
                        "-device", f"virtio-net-pci,netdev=wire{at},mac=52:54:00:00:{at:02}:{number:02}"]
        command += ["-chardev", f"socket,id=monitor,fd={theirs.fileno()}", "-mon", "chardev=monitor,mode=control"]
        self.streams = {}
        for name in ("stdout", "stderr", "status", "beat"):
            ours, theirs = socket.socketpair()
            self.streams[name] = ours
            ends.append(theirs)
            command += ["-chardev", f"socket,id={name},fd={theirs.fileno()}",
                        "-device", f"virtserialport,chardev={name},name={name}"]
        self.process = subprocess.Popen(
            [str(word) for word in command], stdin=None if self.shell else subprocess.DEVNULL,
            stdout=None if self.shell else subprocess.DEVNULL, stderr=open(self.errors, "wb"),
            pass_fds=[end.fileno() for end in ends], env={**os.environ, "TMPDIR": str(directory)},
            # Ctrl-C at a shell's terminal belongs to the program on the host; else this process ends QEMU itself.
            process_group=None if self.shell else 0, preexec_fn=_end_with_parent)
        for end in ends:
            end.close()

    def relay(self, deadline, verbose):
        """Copies the streams until the host tells how the command ended; the words of its last line, or None."""
        outputs = {"stdout": sys.stdout.fileno(), "stderr": sys.stderr.fileno()}
        status, shown, begun = b"", 0, dict.fromkeys(outputs, True)
        between_s = GRACE_S if self.restarts else SILENCE_S
        silences = {} if self.shell else {processor: Silence(between_s) for processor in PROCESSORS}
        with selectors.DefaultSelector() as selector:
            for name, stream in self.streams.items():
                selector.register(stream, selectors.EVENT_READ, name)
            while selector.get_map():
                for key, _ in selector.select(timeout=0.2 if verbose else 1):
                    data = key.fileobj.recv(1 << 16)
                    if not data:
                        selector.unregister(key.fileobj)
                    elif key.data == "beat":
                        for processor in silences.keys() & set(data):
                            silences[processor].broken()
                    elif key.data == "status":
                        status += data
                    else:
                        lines = data.splitlines(keepends=True)
                        marks = [begun[key.data], *[True] * (len(lines) - 1)]
                        _write_all(outputs[key.data], b"".join(self.mark * mark + line for mark, line in zip(marks, lines)))
                        begun[key.data] = data.endswith(b"\n")
                if verbose and self.console.exists():
                    text = self.console.read_bytes()
                    _write_all(sys.stderr.fileno(), text[shown:])
                    shown = len(text)
                # The host writes its status when all output is out; ending QEMU then closes every stream.
                if status.endswith(b"\n") or time.monotonic() > deadline:
                    self.process.kill()
                # All of them are asked, so that all of them count.
                elif any([silence.too_long() for silence in silences.values()]) and not self.stopped:
                    self.stopped = self.processors()
                    self.process.kill()
        self.process.wait()
        return status.decode().split()

    def processors(self):
        """Where the processors of the host stand, looked at three times: says whether one spins, waits or is lost."""
        lines = []
        self.monitor.settimeout(5)
        with contextlib.suppress(OSError, ValueError), self.monitor.makefile("rw") as monitor:
            def ask(command, **arguments):
                monitor.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
                monitor.flush()
                while True:
                    answer = json.loads(monitor.readline())
                    if "return" in answer:
                        return answer["return"]
            ask("qmp_capabilities")
            for _ in range(3):
                registers = ask("human-monitor-command", **{"command-line": "info registers -a"})
                lines += [line for line in registers.splitlines() if re.match("CPU#|RIP=|CR0=|EFER", line)]
        return lines or ["nothing could be read"]

    def end(self):
        self.process.kill()
        self.process.wait()


class Silence:
    """How long a processor of the host has not beaten. Time that this process did not get itself is not held against the host."""

    def __init__(self, between_s):
        self.between_s = between_s
        self.allowed_s = GRACE_S
        self.silent_s = 0
        self.seen_s = time.monotonic()

    def broken(self):
        self.allowed_s = self.between_s
        self.silent_s = 0

    def too_long(self):
        seen_s = time.monotonic()
        self.silent_s += min(seen_s - self.seen_s, 2)
        self.seen_s = seen_s
        return self.silent_s > self.allowed_s


def _sparse(path, size):
    with open(path, "wb") as out:
        out.truncate(size)


def _write_all(descriptor, data):
    while data:
        data = data[os.write(descriptor, data):]


def _end_with_parent():
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def relay_all(hosts, deadline, verbose):
    """Copies the streams of all hosts until the first one's command has ended, or a host is lost: the first host's last words, and the
    host to blame for it."""
    with concurrent.futures.ThreadPoolExecutor(len(hosts)) as pool:
        words = {pool.submit(host.relay, deadline, verbose): host for host in hosts}
        first = next(iter(words))
        try:
            for done in concurrent.futures.as_completed(words):
                if done is first or not done.result():
                    break
        finally:
            for host in hosts:
                host.process.kill()
        return first.result(), words[done]


def run(wanted):
    image = lab_image.find_or_build()
    with workplace() as directory:
        files = pack(wanted, directory)
        wires = [socket.socketpair() for _ in range(2)] if wanted.hosts > 1 else []
        hosts = []
        try:
            for number in range(wanted.hosts):
                hosts.append(Host(wanted, image, files, directory / f"host{number}", number, [wire[number] for wire in wires]))
            deadline = time.monotonic() + (float("inf") if hosts[0].shell else wanted.timeout + GRACE_S)
            ended, host = relay_all(hosts, deadline, wanted.verbose)
        finally:
            for host_left in hosts:
                host_left.end()
        timed_out = ended[:1] == ["timeout"] or (not ended and time.monotonic() > deadline)
        if ended and wanted.get and "get-failed" not in ended:
            unpack(wanted, hosts[0].results)
        if timed_out:
            print(f"lab: the command did not end within {wanted.timeout} s and was ended", file=sys.stderr)
            return STATUS_TIMEOUT
        if not ended:
            why = "the emulated host stopped" if host.stopped else "the host went off before the command ended"
            tail = "".join(f"  {line}\n" for path in (host.errors, host.console) if path.exists()
                           for line in path.read_text(errors="replace").splitlines()[-30:] if "TCG doesn't support" not in line)
            for line in host.stopped or []:
                tail += f"  {line}\n"
            print(f"lab: {why}; its last words:\n{tail}", file=sys.stderr, end="")
            return STATUS_STOPPED if host.stopped else STATUS_LAB_FAILED
        if "get-failed" in ended:
            print(f"lab: not all of these could be read from the host: {', '.join(path for path, _ in wanted.get)}", file=sys.stderr)
            return int(ended[1]) if ended[0] == "exit" and ended[1] != "0" else STATUS_LAB_FAILED
        return int(ended[1])


def run_again(wanted):
    """Runs; a host that stopped is the emulator's failure, so the run may be repeated on a new one."""
    for attempt in range(1, wanted.again + 2):
        status = run(wanted)
        if status != STATUS_STOPPED:
            return status
        if attempt <= wanted.again:
            print(f"lab: starting over on a new host ({attempt} of at most {wanted.again})", file=sys.stderr)
    return STATUS_LAB_FAILED


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    signal.signal(signal.SIGHUP, lambda *_: sys.exit(129))
    try:
        sys.exit(run_again(arguments()))
    except KeyboardInterrupt:
        sys.exit(130)
    except (debian.Failure, OSError, subprocess.CalledProcessError) as failure:
        print(f"lab: {failure}", file=sys.stderr)
        sys.exit(STATUS_LAB_FAILED)
