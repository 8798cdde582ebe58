"""Builds what the lab boots: Debian's cloud kernel, a small initramfs and a root disk; or finds it in the cache.
It is not locked to versions: the lab is a test rig, and stays as it was built until its sources change.
Called by lab.py."""

import hashlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import debian
import root_disk
from initramfs import Initramfs

SOURCES = Path(__file__).resolve().parent / "lab"
SUITE = "bookworm"
# Sparse: what nothing was written to takes no space.
ROOT_BYTES = 16 << 30
# Earlier builds are kept this long after their last use, since other checkouts may have them.
KEPT_S = 14 * 24 * 3600
BOOT_MODULES = ("virtio_pci", "virtio_blk")


def find_or_build():
    """The directory with vmlinuz, initrd and root.raw."""
    builders = [SOURCES.parent / name for name in ("debian.py", "initramfs.py", "lab_image.py", "make-ext4", "root_disk.py")]
    digest = hashlib.sha256()
    for path in sorted([*builders, *(p for p in SOURCES.rglob("*") if p.is_file())]):
        digest.update(f"{path.relative_to(SOURCES.parent)} {os.access(path, os.X_OK)}\n".encode() + path.read_bytes())
    cache = debian.cache_directory() / "lab"
    cache.mkdir(exist_ok=True)
    result = cache / digest.hexdigest()[:24]
    if result.is_dir():
        os.utime(result)
        return result
    with debian.locked(cache / "build.lock"):
        if not result.is_dir():
            with root_disk.workplace(cache, "build") as workplace:
                _build(workplace)
                os.rename(workplace / "result", result)
            for path in cache.glob("[0-9a-f]*"):
                if path != result and time.time() - path.stat().st_mtime > KEPT_S and path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
            say("The lab machine is ready")
    return result


def say(text):
    print(f"lab: {text}", file=sys.stderr, flush=True)


def _build(workplace):
    say("building the lab machine, once; about a minute")
    archive = debian.Archive(SUITE)
    lines = (SOURCES / "packages").read_text().splitlines()
    packages = [line for line in lines if line and not line.startswith("#")]
    kernel = archive.resolve_alone(["linux-image-cloud-amd64"])
    root = archive.resolve(packages)
    for lock in (kernel, root):
        archive.fetch(lock, lambda percent: say(f"downloading {percent} %"))

    result, tree = workplace / "result", workplace / "kernel"
    result.mkdir()
    subprocess.run(["dpkg-deb", "-x", archive.path(kernel, "linux-image-.*"), tree], check=True)
    shutil.copyfile(*tree.glob("boot/vmlinuz-*"), result / "vmlinuz")

    busybox = workplace / "busybox"
    subprocess.run(["dpkg-deb", "-x", archive.path(root, "busybox-static"), busybox], check=True)
    boot = Initramfs(root.epoch)
    boot.busybox(busybox / "bin/busybox")
    boot.modules(tree, BOOT_MODULES)
    boot.file("init", (SOURCES / "boot").read_bytes(), 0o755)
    boot.write(result / "initrd")

    modules = workplace / "modules.tar"
    subprocess.run(["tar", "-C", tree, "--owner=0", "--group=0", "-cf", modules, "./lib/modules"], check=True)
    recipe = {"variant": "essential", "packages": packages, "directory": SOURCES}
    root_disk.make_tree(workplace / "root.tar", root, archive, recipe, workplace,
                        lambda percent: say(f"installing {percent} %"), [modules])
    root_disk.make_disk(result / "root.raw", workplace / "root.tar", ROOT_BYTES, root.epoch, "lab")
