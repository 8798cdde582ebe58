# Installs Debian packages that a script needs and the machine does not have yet.
# Not a program: other scripts source it. It changes nothing when all packages are there.
# Used by everything in scripts/ and guest-images/ that calls a tool outside coreutils.

# need_packages PACKAGE...
# Returns once all are installed; otherwise says what is missing and why it could not be installed.
need_packages() {
  local package missing=() as_root=()
  for package in "$@"; do
    # `dpkg-query` knows a removed package whose settings remain, so ask for the state by name.
    [[ $(dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null) == installed ]] || missing+=("$package")
  done
  ((${#missing[@]})) || return 0

  if ! command -v apt-get >/dev/null; then
    echo "Missing: ${missing[*]}. They can be installed by this script on Debian only; install their equivalents, or use Debian 12." >&2
    return 1
  fi
  if ((EUID != 0)); then
    if ! command -v sudo >/dev/null; then
      echo "Missing Debian packages: ${missing[*]}. As root, run: apt-get install --no-install-recommends ${missing[*]}" >&2
      return 1
    fi
    as_root=(sudo)
  fi
  echo "Installing Debian packages: ${missing[*]}" >&2
  # Two scripts may come here at once, so apt waits for its lock instead of failing.
  if ! "${as_root[@]}" apt-get -q -o DPkg::Lock::Timeout=600 update >&2 ||
    ! "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -q -y -o DPkg::Lock::Timeout=600 \
      install --no-install-recommends "${missing[@]}" >&2; then
    echo "Could not install: ${missing[*]}. See apt's message above; once it is put right, run this again." >&2
    return 1
  fi
}
