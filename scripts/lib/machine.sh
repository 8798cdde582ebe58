# What this machine can run, and small steps that scripts/run and scripts/test share.
# Not a program: other scripts source it. It changes nothing on the machine.

# step WORDS...: says what happens next.
step() {
  printf '\n== %s\n' "$*" >&2
}

# kvm_kind VMM: prints `none`, `probe` (bare guests run, Linux does not) or `linux`.
kvm_kind() {
  local report
  if [[ ! -r /dev/kvm || ! -w /dev/kvm ]] || ! report=$("$1" probe --kvm /dev/kvm 2>/dev/null); then
    echo none
  elif grep -q '"linux": *"yes"' <<<"$report"; then
    echo linux
  else
    echo probe
  fi
}

# kvm_words KIND: the same for people.
kvm_words() {
  case $1 in
    none) echo "is missing or not permitted" ;;
    probe) echo "runs bare guests natively, but not Linux" ;;
    linux) echo "runs Linux guests" ;;
  esac
}

# test_binary NAME: path of the compiled integration test NAME of the root package.
test_binary() {
  cargo test --no-run --test "$1" --message-format=json 2>/dev/null |
    grep -o "\"executable\":\"[^\"]*/$1-[^\"]*\"" | tail -n 1 | cut -d'"' -f4
}

# images_beside DIR...: a directory whose entries are the given image directories under their own names.
images_beside() {
  local folder image
  folder=$(mktemp -d)
  for image in "$@"; do
    ln -s "$image" "$folder/$(grep -o '"name": *"[^"]*"' "$image/image.json" | head -n 1 | cut -d'"' -f4)"
  done
  echo "$folder"
}

# in_own_network COMMAND...: runs it where it sees no device of the host, and where everything it starts ends
# with it.
in_own_network() {
  unshare --net --mount --pid --fork --kill-child --mount-proc \
    sh -c 'ip link set lo up && exec "$@"' sh "$@"
}
