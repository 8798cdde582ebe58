"""Makes an ext4 disk from exact Debian packages with mmdebstrap; same packages and files, same bytes.
It is not a recipe: what goes in is its caller's choice. It needs root or unprivileged user namespaces.
Called by guest_image.py and lab_image.py."""

import contextlib
import io
import os
import re
import signal
import subprocess
import sys
import tarfile
import tempfile
import uuid
from pathlib import Path

LIBRARY = Path(__file__).resolve().parent
# What is mounted on the way is seen by the build alone. Others than root build as root of a user
# namespace that maps their own id to 0, so that it may read their files.
AS_ROOT = ["unshare", "--mount", "--propagation=private"] if os.geteuid() == 0 else [
    "unshare", "--user", "--map-root-user", "--map-auto", "--mount", "--pid", "--fork", "--mount-proc"]
# What mmdebstrap says when it comes to each step, and how far along that is, in percent.
STEPS = (("running apt-get update", 2), ("downloading packages", 5), ("extracting archives", 10),
         ("installing essential packages", 20), ("installing remaining packages", 35),
         ("running --customize-hook", 85), ("cleaning package lists", 88), ("creating tarball", 90))
# How long an interrupted mmdebstrap may take to clean up.
STOP_S = 30


@contextlib.contextmanager
def workplace(parent, name):
    """A directory for one build, gone at its end. Call it under the build's lock: it removes what killed builds left."""
    leftovers = list(parent.glob(f".{name}.*"))
    path = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=parent))
    try:
        _remove(leftovers)
        yield path
    finally:
        _remove([path])


def _remove(paths):
    # In a user namespace the files of a tree belong to ids that are not the user's own.
    if paths:
        subprocess.run([*AS_ROOT, "rm", "-rf", "--one-file-system", *paths], check=False)


def make_tree(tar, lock, archive, recipe, workplace, progress, added_tars=()):
    """Installs the locked packages with the recipe's files and settings; the result is a sorted tar."""
    sources = archive.write_archive(lock, workplace / "archive")
    command = [*AS_ROOT, "mmdebstrap", "--mode=root", "--verbose", "--format=tar", f"--variant={recipe.get('variant', 'apt')}",
               "--architectures=amd64", "--hook-dir=/usr/share/mmdebstrap/hooks/merged-usr",
               f"--include={','.join(recipe['packages'])}",
               "--aptopt=APT::Install-Recommends \"false\"",
               # An emulated guest has better things to do than to keep what nobody reads on a server.
               "--dpkgopt=path-exclude=/usr/share/doc/*", "--dpkgopt=path-include=/usr/share/doc/*/copyright",
               "--dpkgopt=path-exclude=/usr/share/man/*", "--dpkgopt=path-exclude=/usr/share/info/*",
               "--dpkgopt=path-exclude=/usr/share/locale/*", "--dpkgopt=path-exclude=/usr/share/lintian/*"]
    directory = recipe["directory"]
    for hook, name in (("essential", "files-before"), ("customize", "files")):
        if (directory / name).is_dir():
            bundle = workplace / f"{name}.tar"
            _write_tar(bundle, directory / name, lock.epoch)
            command.append(f"--{hook}-hook=tar-in {bundle} /")
    command += [f"--customize-hook=tar-in {added} /" for added in added_tars]
    if (directory / "customize").exists():
        command += [f"--customize-hook=copy-in {directory / 'customize'} /",
                    "--customize-hook=chroot \"$1\" sh /customize", "--customize-hook=rm \"$1\"/customize"]
    command += [archive.suite, tar, sources]
    # What Python compiles by itself while packages are set up differs from run to run; what they ask for does not.
    environment = {**os.environ, "SOURCE_DATE_EPOCH": str(lock.epoch), "PYTHONDONTWRITEBYTECODE": "1",
                   "LC_ALL": "C", "TZ": "UTC", "TMPDIR": str(workplace)}
    _run_with_steps([str(part) for part in command], environment, workplace / "mmdebstrap.log", progress)


def make_disk(image, tar, size_bytes, epoch, seed):
    """Turns the tar into a sparse ext4 image, a file system on the whole disk."""
    identity = str(uuid.uuid5(uuid.NAMESPACE_OID, seed))
    subprocess.run([*AS_ROOT, "bash", LIBRARY / "make-ext4", tar, image, str(size_bytes), str(epoch), identity],
                   check=True, stdout=sys.stderr)


def _write_tar(path, directory, epoch):
    """The files of a checkout with the modes git keeps; its umask and owners must not matter."""
    for name in ("bin", "lib", "lib64", "sbin"):
        if (directory / name).exists():
            raise SystemExit(f"{directory / name} would replace a link of the merged /usr; put the files under usr/{name}")
    with tarfile.open(path, "w") as tar:
        for source in sorted(directory.rglob("*")):
            entry = tarfile.TarInfo(str(source.relative_to(directory)))
            entry.mtime, entry.uname, entry.gname = epoch, "root", "root"
            if source.is_symlink():
                entry.type, entry.linkname = tarfile.SYMTYPE, os.readlink(source)
                tar.addfile(entry)
            elif source.is_dir():
                entry.type, entry.mode = tarfile.DIRTYPE, 0o755
                tar.addfile(entry)
            else:
                data = source.read_bytes()
                entry.size, entry.mode = len(data), 0o755 if os.access(source, os.X_OK) else 0o644
                tar.addfile(entry, io.BytesIO(data))


def _run_with_steps(command, environment, log, progress):
    """Runs mmdebstrap, tells its steps as they come, and shows the end of its log when it fails."""
    with open(log, "w") as out:
        process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=out,
                                   stderr=subprocess.PIPE, text=True, errors="replace", start_new_session=True)
        try:
            for line in process.stderr:
                out.write(line)
                for text, percent in STEPS:
                    if re.search(f"^I: {text}", line):
                        progress(percent)
            failed = process.wait()
        except BaseException:
            # mmdebstrap removes its tree upon SIGTERM. The whole group, as `unshare` passes no signal on.
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
            raise
    if failed:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-25:])
        raise SystemExit(f"{tail}\nmmdebstrap failed with status {failed}; its last lines are above")
