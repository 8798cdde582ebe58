"""Builds guest images from their recipes, or finds them in the cache.
It is not run by hand: guest-images/build and guest-images/lock install what it needs and start it.
The daemon's catalogue import runs guest-images/build and reads its `progress:` lines."""

import argparse
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import tomllib
from pathlib import Path

import debian
import root_disk
from initramfs import Initramfs

IMAGES = Path(__file__).resolve().parents[2] / "guest-images"
BUILDERS = ("debian.py", "guest_image.py", "initramfs.py", "make-ext4", "root_disk.py")
MEMBERS = ("root.raw", "vmlinuz", "initrd")
FORMAT_VERSION = 1
# Earlier builds of the same recipe are kept this long after their last use.
KEPT_S = 14 * 24 * 3600


def progress(phase, percent):
    print(f"progress: {phase} {min(int(percent), 100)}", file=sys.stderr, flush=True)


def say(text):
    print(text, file=sys.stderr, flush=True)


def read_recipe(name):
    catalogue = tomllib.loads((IMAGES / "catalogue.toml").read_text())
    if name not in catalogue:
        raise debian.Failure(f"there is no recipe {name!r}; guest-images/catalogue.toml has: {', '.join(catalogue)}")
    # One that is like another has that one's settings and files, but for what it states, and a lock of its own.
    like = catalogue[name].get("like", name)
    if like not in catalogue:
        raise debian.Failure(f"recipe {name} is like {like!r}, which guest-images/catalogue.toml does not have")
    return {**catalogue[like], **catalogue[name], "name": name, "directory": IMAGES / "recipes" / like}


def lock_file_of(recipe):
    return IMAGES / "recipes" / recipe["name"] / "packages.lock"


def key_of(recipe, lock):
    """Names a build by everything that can change its bytes."""
    digest = hashlib.sha256(lock.text().encode())
    digest.update(json.dumps({k: v for k, v in recipe.items() if k != "directory"}, sort_keys=True).encode())
    sources = [p for p in sorted(recipe["directory"].rglob("*")) if p.name != "packages.lock" and not p.is_dir()]
    for path in (*sources, *(Path(__file__).parent / name for name in BUILDERS)):
        content = os.readlink(path).encode() if path.is_symlink() else path.read_bytes()
        digest.update(f"{path.relative_to(IMAGES.parent)} {os.access(path, os.X_OK)} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def find_or_build(recipe, locked):
    """The image directory in the cache, built when it is not there."""
    lock = debian.Lock.read(lock_file_of(recipe))
    cache = debian.cache_directory() / "images"
    cache.mkdir(exist_ok=True)
    result = cache / f"{recipe['name']}-{key_of(recipe, lock)[:24]}"
    # A build with newer packages than locked has a name of its own, so that --locked never takes it.
    newer = Path(f"{result}-newer")
    with debian.locked(cache / f"{recipe['name']}.lock"):
        if result.is_dir():
            os.utime(result)
            return result
        if newer.is_dir() and not locked:
            say(f"warning: this {recipe['name']} has newer packages than its lock file; `guest-images/lock {recipe['name']}` brings the lock up to date")
            os.utime(newer)
            return newer
        progress("resolve", 0)
        archive = debian.Archive(recipe["suite"])
        missing = archive.missing(lock)
        if missing:
            listed = ", ".join(f"{p.name} {p.version}" for p in missing[:5]) + (", ..." if len(missing) > 5 else "")
            if locked:
                raise debian.Failure(f"Debian no longer offers {len(missing)} of the locked packages ({listed}). "
                                     f"Run `guest-images/lock {recipe['name']}` and commit the new lock file, or leave out --locked")
            say(f"WARNING: the lock file of {recipe['name']} is stale: Debian no longer offers {len(missing)} of its packages ({listed}).\n"
                f"WARNING: building with today's versions; image.json records them. `guest-images/lock {recipe['name']}` brings the lock up to date.")
            lock, result = resolve(recipe, archive), newer
        with root_disk.workplace(cache, recipe["name"]) as workplace:
            build(recipe, lock, archive, workplace)
            os.rename(workplace / "result", result)
        remove_old(cache, recipe["name"], result)
        progress("done", 100)
        return result


def resolve(recipe, archive):
    if recipe["kind"] == "root":
        return archive.resolve(recipe["packages"])
    lock = archive.resolve_alone(recipe["packages"])
    if "disk_packages" in recipe:
        disk = archive.resolve(recipe["disk_packages"])
        lock = debian.Lock(lock.epoch, tuple(sorted({*lock.packages, *disk.packages})))
    return lock


def build(recipe, lock, archive, workplace):
    """Leaves the finished image directory in workplace/result."""
    result = workplace / "result"
    result.mkdir()
    progress("fetch", 2)
    archive.fetch(lock, lambda percent: progress("fetch", 2 + percent * 0.28))
    say(f"Building {recipe['name']}")
    if recipe["kind"] == "initramfs":
        build_initramfs(recipe, lock, archive, workplace, result)
    else:
        build_root(recipe, lock, archive, workplace, result)
    progress("checksum", 94)
    write_manifest(recipe, lock, result)
    for path in result.iterdir():
        path.chmod(0o444)
        os.utime(path, (lock.epoch, lock.epoch))
    result.chmod(0o755)


def build_initramfs(recipe, lock, archive, workplace, result):
    """The kernel as Debian ships it, and busybox with the recipe's modules and files; a disk with `disk_packages`."""
    tree = workplace / "tree"
    for package in lock.packages:
        # The kernel's own package has a version in its name.
        if package.name in recipe["packages"] or re.match(r"linux-image-\d", package.name):
            subprocess.run(["dpkg-deb", "-x", archive.path(lock, re.escape(package.name)), tree], check=True)
    progress("install", 60)
    kernel, = tree.glob("boot/vmlinuz-*")
    shutil.copyfile(kernel, result / "vmlinuz")
    image = Initramfs(lock.epoch)
    image.busybox(tree / "bin/busybox")
    image.link("init", "bin/busybox")
    listed = (recipe["directory"] / "modules").read_text().splitlines()
    image.modules(tree, [name for line in listed if (name := line.split("#")[0].strip())])
    files = recipe["directory"] / "files"
    for path in sorted(files.rglob("*")):
        if path.is_file():
            image.file(str(path.relative_to(files)), path.read_bytes(), 0o755 if os.access(path, os.X_OK) else 0o644)
    image.write(result / "initrd")
    if "disk_packages" in recipe:
        disk = {**recipe, "packages": recipe["disk_packages"], "directory": recipe["directory"] / "disk", "variant": "essential"}
        install(disk, lock, archive, workplace, result)


def build_root(recipe, lock, archive, workplace, result):
    """A disk with the packages installed; kernel and initrd are copied out of it for direct boot."""
    tar = install(recipe, lock, archive, workplace, result)
    with tarfile.open(tar) as tree:
        for member in tree:
            for prefix, name in (("./boot/vmlinuz-", "vmlinuz"), ("./boot/initrd.img-", "initrd")):
                if member.name.startswith(prefix):
                    with tree.extractfile(member) as source, open(result / name, "wb") as target:
                        shutil.copyfileobj(source, target)


def install(recipe, lock, archive, workplace, result):
    """Leaves the disk with the recipe's packages in the result; the tar it was made from."""
    tar = workplace / "root.tar"
    root_disk.make_tree(tar, lock, archive, recipe, workplace, lambda percent: progress("install", 30 + percent * 0.5))
    progress("disk", 80)
    root_disk.make_disk(result / "root.raw", tar, recipe["min_disk_bytes"], lock.epoch, recipe["name"])
    return tar


def write_manifest(recipe, lock, result):
    def part(name):
        path = result / name
        return {"file": name, "sha256": debian.file_sha256(path)} if path.exists() else None

    disk = part("root.raw")
    if disk:
        disk = {"file": disk["file"], "format": "raw", "size_bytes": (result / "root.raw").stat().st_size,
                "sha256": disk["sha256"]}
    manifest = {
        "format_version": FORMAT_VERSION, "name": recipe["name"], "title": recipe["title"],
        "description": recipe["description"], "architecture": "x86_64",
        "disk": disk, "kernel": part("vmlinuz"), "initrd": part("initrd"), "cmdline": recipe["cmdline"],
        "min_memory_bytes": recipe["min_memory_bytes"], "min_disk_bytes": recipe["min_disk_bytes"],
        "default_user": recipe["default_user"], "console": recipe["console"],
        "packages": [{"name": p.name, "version": p.version} for p in lock.packages],
    }
    (result / "image.json").write_text(json.dumps(manifest, indent=2) + "\n")


def remove_old(cache, name, current):
    for path in cache.glob(f"{name}-*"):
        if path != current and time.time() - path.stat().st_mtime > KEPT_S:
            shutil.rmtree(path, ignore_errors=True)


def copy_out(image, destination):
    """Copies without filling holes, sharing blocks where the file system can."""
    destination.mkdir(parents=True, exist_ok=True)
    for name in ("image.json", *MEMBERS):
        (destination / name).unlink(missing_ok=True)
        if (image / name).exists():
            subprocess.run(["cp", "--sparse=always", "--reflink=auto", "--preserve=timestamps", image / name, destination],
                           check=True)
    return destination


def write_bundle(image, path):
    """One tar with image.json first: what `POST /v1/images` takes as its upload stream."""
    with tempfile.NamedTemporaryFile(dir=Path(path).resolve().parent, delete=False) as out:
        try:
            with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as tar:
                for name in ("image.json", *MEMBERS):
                    if (image / name).exists():
                        entry = tar.gettarinfo(image / name, name)
                        entry.uid, entry.gid, entry.uname, entry.gname, entry.mode = 0, 0, "root", "root", 0o644
                        with open(image / name, "rb") as source:
                            tar.addfile(entry, source)
            os.chmod(out.name, 0o644)
            os.rename(out.name, path)
        except BaseException:
            os.unlink(out.name)
            raise


def arguments():
    parser = argparse.ArgumentParser(prog="guest-images/build", description="Builds a guest image, or finds it in the cache, and prints its directory.")
    parser.add_argument("recipe", help="a name from guest-images/catalogue.toml")
    parser.add_argument("--out", type=Path, metavar="DIR", help="copy the image into DIR and print that instead")
    parser.add_argument("--bundle", type=Path, metavar="FILE", help="also write the image as one tar, for POST /v1/images")
    parser.add_argument("--locked", action="store_true", help="fail when a package of the lock file is no longer to be had")
    parser.add_argument("--print-key", action="store_true", help="print what names the build in the cache, and build nothing")
    parser.add_argument("--lock", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def main():
    wanted = arguments()
    recipe = read_recipe(wanted.recipe)
    lock_file = lock_file_of(recipe)
    if wanted.lock:
        lock = resolve(recipe, debian.Archive(recipe["suite"]))
        unchanged = lock_file.exists() and debian.Lock.read(lock_file).packages == lock.packages
        if not unchanged:
            lock_file.write_text(lock.text())
        say(f"{lock_file} is {'up to date' if unchanged else 'written'}: {len(lock.packages)} packages")
        return
    if wanted.print_key:
        print(key_of(recipe, debian.Lock.read(lock_file)))
        return
    image = find_or_build(recipe, wanted.locked)
    if wanted.bundle:
        write_bundle(image, wanted.bundle)
    print(copy_out(image, wanted.out) if wanted.out else image)


if __name__ == "__main__":
    # So that `finally` blocks and context managers clean up when the daemon cancels an import.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        main()
    except (debian.Failure, OSError, subprocess.CalledProcessError) as failure:
        sys.exit(f"error: {failure}")
    except KeyboardInterrupt:
        sys.exit(130)
