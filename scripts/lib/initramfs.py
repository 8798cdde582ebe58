"""Writes an initramfs: busybox, kernel modules in loading order, and a few files; same input, same bytes.
It is left uncompressed: a guest on emulated hardware loads 4 MB faster than it inflates 2 MB.
Called by guest_image.py (the tiny image) and lab_image.py."""

import re
import subprocess
from pathlib import Path


class Initramfs:
    """Collects entries, then writes them as one sorted cpio archive in the kernel's `newc` format."""

    def __init__(self, epoch):
        self._epoch = epoch
        self._entries = {}
        for path in ("dev", "etc", "mnt", "proc", "root", "run", "sys", "tmp"):
            self.directory(path)
        # The kernel opens the console for the first process before devtmpfs is there.
        self._entries["dev/console"] = (0o020600, b"", (5, 1))

    def directory(self, path):
        if path not in ("", ".") and path not in self._entries:
            self.directory(str(Path(path).parent))
            self._entries[path] = (0o040755, b"", (0, 0))

    def file(self, path, data, mode=0o644):
        self.directory(str(Path(path).parent))
        self._entries[path] = (0o100000 | mode, data, (0, 0))

    def link(self, path, destination):
        self.directory(str(Path(path).parent))
        self._entries[path] = (0o120777, destination.encode(), (0, 0))

    def busybox(self, binary):
        """The binary and a link for each of its commands, which saves making them at every boot."""
        self.file("bin/busybox", binary.read_bytes(), 0o755)
        listed = subprocess.run([binary, "--list"], check=True, capture_output=True, text=True).stdout
        for command in listed.split():
            if command != "busybox":
                self.link(f"bin/{command}", "busybox")
        self.link("sbin", "bin")

    def modules(self, kernel_tree, wanted):
        """`wanted` modules and all they depend on; /lib/modules/order names them, dependencies first."""
        by_name = {_module_name(p.stem): p for p in Path(kernel_tree, "lib/modules").rglob("*.ko")}
        order = []

        def visit(name):
            if name in order:
                return
            if name not in by_name:
                raise SystemExit(f"the kernel package has no module {name}")
            data = by_name[name].read_bytes()
            found = re.search(rb"\0depends=([^\0]*)\0", data)
            for dependency in filter(None, found[1].decode().split(",") if found else ()):
                visit(_module_name(dependency))
            order.append(name)
            self.file(f"lib/modules/{name}.ko", data)

        for name in wanted:
            visit(_module_name(name))
        self.file("lib/modules/order", ("\n".join(order) + "\n").encode())

    def write(self, path):
        with open(path, "wb") as out:
            for number, (name, (mode, data, device)) in enumerate(sorted(self._entries.items()), 1):
                self._record(out, name, number, mode, data, device)
            self._record(out, "TRAILER!!!", 0, 0, b"", (0, 0))
            out.write(bytes(-out.tell() % 512))

    def _record(self, out, name, number, mode, data, device):
        fields = (number, mode, 0, 0, 1, self._epoch, len(data), 0, 0, *device, len(name) + 1, 0)
        out.write(b"070701" + b"".join(b"%08X" % field for field in fields) + name.encode() + b"\0")
        out.write(bytes(-out.tell() % 4))
        out.write(data)
        out.write(bytes(-out.tell() % 4))


def _module_name(name):
    # Files may use a dash where the kernel's own name has an underscore.
    return name.replace("-", "_")
