"""Resolves Debian packages to exact versions and fetches them into a pool, without touching the host's own packages.
It is not an installer: mmdebstrap installs from the small archive that `write_archive` lays out.
Called by guest_image.py and lab_image.py."""

import calendar
import contextlib
import fcntl
import hashlib
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
# Package lists are asked for again after this time; a lock file makes older ones harmless.
LISTS_FRESH_S = 3600
# Says that /usr is merged from the start. Without it apt would choose the converter and all of perl.
MERGED = "usr-is-merged"


class Failure(Exception):
    """Something the user can act on; printed without a traceback."""


class Package(NamedTuple):
    """One line of a lock file."""

    name: str
    version: str
    architecture: str
    sha256: str

    @property
    def file_name(self):
        return f"{self.name}_{self.version.replace(':', '%3a')}_{self.architecture}.deb"


class Lock(NamedTuple):
    """Exact packages, and the time stamp that everything built from them carries."""

    epoch: int
    packages: tuple

    @classmethod
    def read(cls, path):
        epoch, packages = None, []
        for number, line in enumerate(Path(path).read_text().splitlines(), 1):
            fields = line.split("#")[0].split()
            if not fields:
                continue
            if fields[0] == "epoch" and len(fields) == 2 and fields[1].isdigit():
                epoch = int(fields[1])
            elif len(fields) == 4 and re.fullmatch("[0-9a-f]{64}", fields[3]):
                packages.append(Package(*fields))
            else:
                raise Failure(f"{path}:{number}: expected `epoch SECONDS` or `name version architecture sha256`")
        if epoch is None or not packages:
            raise Failure(f"{path} is not a whole lock file; make it again with `guest-images/lock`")
        return cls(epoch, tuple(sorted(packages)))

    def text(self):
        head = "# Exact packages of this recipe: name version architecture sha256. Made by guest-images/lock.\n"
        lines = [" ".join(package) for package in self.packages]
        return f"{head}epoch {self.epoch}\n" + "\n".join(lines) + "\n"


def cache_directory():
    """Where downloads and finished builds are kept, outside the checkout."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    path = Path(os.environ.get("TOFT_CACHE") or Path(base, "toft")).resolve()
    path.mkdir(parents=True, exist_ok=True)
    return path


@contextlib.contextmanager
def locked(path):
    """Holds a file lock, so that two runs do the same work once; says when it has to wait."""
    with open(path, "w") as handle:
        # Short waits are common and not worth a word.
        for _ in range(10):
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            time.sleep(0.1)
        else:
            print(f"Waiting for another run that holds {path}", file=sys.stderr)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def file_sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while chunk := handle.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


class Archive:
    """Debian as the host's apt knows it, seen through an apt state of our own with nothing installed."""

    def __init__(self, suite):
        self.suite = suite
        self.root = cache_directory() / "apt" / suite
        self.pool = cache_directory() / "pool"
        for path in (self.root / "lists/partial", self.root / "archives/partial", self.pool):
            path.mkdir(parents=True, exist_ok=True)
        (self.root / "status").touch()
        (self.root / "empty").mkdir(exist_ok=True)
        self._index = None

    def resolve(self, wanted):
        """Everything needed to install `wanted` and Debian's essential packages on an empty disk."""
        self._update()
        essential = [s["Package"] for s in self._stanzas().values() if s.get("Essential") == "yes"]
        text = self._apt("apt-get", "-qq", "--print-uris", "--no-install-recommends", "install",
                         *sorted({*essential, *wanted, MERGED}))
        packages = set()
        for file_name in re.findall(r"^'\S+' (\S+\.deb) \d+", text, re.MULTILINE):
            name, version, architecture = unquote(file_name)[: -len(".deb")].split("_")
            packages.add(self._known(name, version, architecture))
        return Lock(self._epoch(), tuple(sorted(packages)))

    def resolve_alone(self, wanted):
        """`wanted` without their dependencies, for files that are unpacked rather than installed.
        Of Debian's kernel packages, which only point at the newest one, the kernel itself is taken."""
        self._update()
        packages, names = set(), list(wanted)
        while names:
            shown = self._apt("apt-cache", "show", "--no-all-versions", names.pop())
            fields = dict(re.findall(r"^(Package|Version|Architecture|Depends): (.*)$", shown, re.MULTILINE))
            kernel = re.match(r"(linux-image-\d\S*) \(", fields.get("Depends", ""))
            if kernel:
                names.append(kernel[1])
            else:
                packages.add(self._known(fields["Package"], fields["Version"], fields["Architecture"]))
        return Lock(self._epoch(), tuple(sorted(packages)))

    def missing(self, lock):
        """The packages of `lock` that are neither in the pool nor in the archive any more."""
        absent = [p for p in lock.packages if not self._pooled(p).exists()]
        if not absent:
            return []
        self._update()
        return [p for p in absent if self._known(*p[:3]) != p]

    def fetch(self, lock, progress):
        """Downloads what the pool lacks; every file is checked against its SHA-256 before it gets its name."""
        absent = [p for p in lock.packages if not self._pooled(p).exists()]
        if not absent:
            return
        self._update()
        total = sum(int(self._stanzas()[p[:3]]["Size"]) for p in absent)
        print(f"Downloading {len(absent)} packages, {total / 1e6:.0f} MB", file=sys.stderr)
        with locked(self.root / "fetch.lock"):
            done = 0
            # In small batches, so that progress is told while a large set comes in.
            for start in range(0, len(absent), 8):
                batch = [p for p in absent[start : start + 8] if not self._pooled(p).exists()]
                if batch:
                    self._download(batch)
                done += sum(int(self._stanzas()[p[:3]]["Size"]) for p in absent[start : start + 8])
                progress(100 * done // max(total, 1))

    def _download(self, batch):
        self._apt("apt-get", "-q", "download", *[f"{p.name}={p.version}" for p in batch],
                  cwd=self.root / "archives")
        for package in batch:
            path = self.root / "archives" / package.file_name
            found = file_sha256(path)
            if found != package.sha256:
                path.unlink()
                raise Failure(f"{package.name} {package.version} came with SHA-256 {found}, "
                              f"the lock says {package.sha256}")
            path.rename(self._pooled(package))

    def path(self, lock, name_pattern):
        """The pooled file of the one package whose name matches."""
        matches = [p for p in lock.packages if re.fullmatch(name_pattern, p.name)]
        if len(matches) != 1:
            raise Failure(f"the lock should name one package like {name_pattern}, it names {len(matches)}")
        return self._pooled(matches[0])

    def write_archive(self, lock, directory):
        """Lays out a flat apt archive holding exactly the locked packages; returns its sources line."""
        directory.mkdir(parents=True)
        stanzas = []
        for package in lock.packages:
            pooled = self._pooled(package)
            (directory / package.file_name).symlink_to(pooled)
            control = subprocess.run(["dpkg-deb", "-f", pooled], check=True, capture_output=True, text=True).stdout
            stanzas.append(f"{control.rstrip()}\nFilename: ./{package.file_name}\n"
                           f"Size: {pooled.stat().st_size}\nSHA256: {package.sha256}\n")
        index = "\n".join(stanzas).encode()
        (directory / "Packages").write_bytes(index)
        # mmdebstrap finds the essential packages by the code name. The files were checked when they
        # were fetched, so the archive needs no signature of its own.
        (directory / "Release").write_text(f"Codename: {self.suite}\nArchitectures: amd64\nSHA256:\n"
                                           f" {hashlib.sha256(index).hexdigest()} {len(index)} Packages\n")
        return f"deb [trusted=yes] copy:{directory} ./"

    def _pooled(self, package):
        return self.pool / f"{package.sha256}.deb"

    def _known(self, name, version, architecture):
        stanza = self._stanzas().get((name, version, architecture))
        return stanza and Package(name, version, architecture, stanza["SHA256"])

    def _apt(self, *command, cwd=None):
        options = {
            "Dir::State": self.root, "Dir::State::status": self.root / "status", "Dir::State::lists": self.root / "lists",
            "Dir::Cache": self.root, "Dir::Cache::archives": self.root / "archives",
            "Dir::Etc::sourcelist": self.root / "sources.list", "Dir::Etc::sourceparts": self.root / "empty",
            "Dir::Etc::preferences": "/dev/null", "Dir::Etc::preferencesparts": self.root / "empty",
            "APT::Architecture": "amd64", "APT::Architectures": "amd64",
            "APT::Sandbox::User": "root", "Acquire::Languages": "none", "Debug::NoLocking": "1",
        }
        flags = [flag for key, value in options.items() for flag in ("-o", f"{key}={value}")]
        done = subprocess.run([command[0], *flags, *command[1:]], cwd=cwd, text=True, capture_output=True,
                              env={**os.environ, "LC_ALL": "C"})
        if done.returncode:
            raise Failure(f"{' '.join(map(str, command[:4]))} failed:\n{done.stderr.strip()}")
        return done.stdout

    def _update(self):
        """Brings the package lists up to date, at most once an hour and once at a time."""
        stamp = self.root / "updated"
        if self._index is not None:
            return
        with locked(self.root / "update.lock"):
            if not stamp.exists() or time.time() - stamp.stat().st_mtime > LISTS_FRESH_S:
                print("Reading Debian's package lists", file=sys.stderr)
                (self.root / "sources.list").write_text("\n".join(self._sources()) + "\n")
                self._apt("apt-get", "-q", "update")
                stamp.touch()

    def _sources(self):
        """The host's own entries for this Debian suite; other vendors' entries are left out."""
        shape = "$(ORIGIN)|$(CODENAME)|$(SITE)|$(RELEASE)|$(COMPONENT)|$(IDENTIFIER)"
        listed = subprocess.run(["apt-get", "indextargets", "--format", shape], capture_output=True, text=True)
        sources = set()
        for line in listed.stdout.splitlines():
            origin, codename, site, release, component, identifier = line.split("|")
            ours = codename == self.suite or codename.startswith((f"{self.suite}-security", f"{self.suite}-updates"))
            if origin == "Debian" and ours and component == "main" and identifier == "Packages":
                signed = f" [signed-by={KEYRING}]" if KEYRING.exists() else ""
                sources.add(f"deb{signed} {site} {release} {component}")
        if not sources:
            raise Failure(f"this machine's apt has no package lists of Debian {self.suite}. Run `apt-get update` as root; "
                          "if that does not help, add Debian's own entry to /etc/apt/sources.list")
        return sorted(sources)

    def _stanzas(self):
        """Every known version as fields, by (name, version, architecture)."""
        if self._index is None:
            self._index = {}
            files = self._apt("apt-get", "indextargets", "--format", "$(FILENAME)", "Identifier: Packages").split()
            for path in files:
                text = subprocess.run(["/usr/lib/apt/apt-helper", "cat-file", path], check=True,
                                      capture_output=True, text=True).stdout
                for block in text.split("\n\n"):
                    fields = dict(re.findall(r"^(Package|Version|Architecture|Essential|Size|SHA256): (.*)$",
                                             block, re.MULTILINE))
                    if fields:
                        self._index[fields["Package"], fields["Version"], fields["Architecture"]] = fields
        return self._index

    def _epoch(self):
        """The newest date of the archive's own release files: moves only when the packages may have."""
        dates = []
        for path in (self.root / "lists").glob("*Release"):
            found = re.search(r"^Date: (.*)$", path.read_text(errors="replace"), re.MULTILINE)
            if found:
                dates.append(calendar.timegm(time.strptime(found[1], "%a, %d %b %Y %H:%M:%S %Z")))
        return max(dates)
